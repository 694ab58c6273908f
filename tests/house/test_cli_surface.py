"""The verbs and flags are a promise: a change here is a change of the interface, and belongs in the changelog."""

import typer

from metier.cli import VERBS, load

SURFACE = {
    "list": {"kind", "text", "where", "json"},
    "suggest": {
        "kind", "data", "noise", "scores", "no_reference", "length_bias", "chosen_falling", "off_policy", "diversity", "credit",
        "untuned", "limit", "json",
    },
    "rows": {"json", "status"},
    "show": {"name", "source", "json"},
    "train": {"run", "overrides", "out", "restart", "quiet", "json"},
    "compare": {"design", "seeds", "out", "ray", "record", "quiet", "json"},
    "runs": {"which", "root", "json"},
    "report": {"folder", "out", "json"},
    "new": {"kind", "name", "root"},
    "doctor": {"json"},
    "probe": {"batches", "changes", "json", "name", "on", "run"},
    "fit": {"at", "bootstrap", "holdout", "json", "law", "options", "plot", "seed", "starts", "table"},
    "schedule": {"name", "options", "steps", "lr", "longer", "tokens_per_step", "json"},
    "meta": {"run", "overrides", "out", "iterations", "pairs", "sigma", "lr", "seed", "json"},
    "plan": {"run", "overrides", "step", "json"},
    "eval": {
        "target", "overrides", "data", "format", "limit", "objective", "tasks", "answers", "max_new_tokens", "prompts", "reward", "json",
    },
    "check": {"part", "all_parts", "minutes", "contract", "quick", "seeds", "out", "json"},
    "merge": {"method", "inputs", "out", "base", "json"},
    "export": {"run", "merged", "adapter", "prompt", "json"},
    "chat": {"run", "prompts", "max_new_tokens", "temperature", "seed", "decode", "json"},
}  # fmt: skip
SUBCOMMANDS = {
    "logic": {
        "explain": {"program", "json"},
        "decompile": {"ratio", "json"},
        "list": {"strict", "monotone", "json"},
        "lattice": {"programs", "json"},
    }
}
READING = {"list", "suggest", "rows", "show", "runs", "report", "doctor", "plan", "eval"}


def params(command) -> set[str]:
    return {p.name for p in command.params if p.name not in ("help", "install_completion", "show_completion")}


def test_every_verb_loads_and_has_help():
    for verb in VERBS:
        command = load(verb)
        assert command.help or isinstance(command, typer.core.TyperGroup), verb


def test_flags_are_frozen():
    for verb, expected in SURFACE.items():
        assert params(load(verb)) == expected, verb


def test_flags_of_subcommands_are_frozen():
    for verb, expected in SUBCOMMANDS.items():
        assert {name: params(sub) for name, sub in load(verb).commands.items()} == expected, verb


def test_reading_verbs_speak_json():
    for verb in READING:
        assert "json" in params(load(verb)), verb
