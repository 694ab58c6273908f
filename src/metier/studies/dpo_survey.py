"""Twenty preference objectives under four stressors: do the variants remedy what their tags say?

The bench's fine-tuned model, 64 steps of 64 answers (32 pairs, or 64 single answers) at learning rate 1e-3, two seeds, every
objective with its own defaults, which are not tuned to each other: what is compared is how an objective changes from one kind of
data to another, or a behaviour that its form fixes. Kinds of data: clean; 30 % of the labels flipped; a bonus for length in the
labels, so that 70 % of the chosen answers are the longer ones; answers in other words than the model's own (synonyms of the
second set). A kind has 2048 pairs for each seed, the same for all objectives, each seen once; objectives for single answers read
them as such. Gold reward and length of 128 sampled answers, implicit rewards on 200 clean held-out pairs.

Predictions, from the tags alone and against DPO: those for noise lose less gold reward to flipped labels; those for length grow
less on confounded labels; those for the likelihood of good answers keep the chosen answers' log-probability higher on clean ones.
Each is about the mean over the objectives with that tag, and is shown with its standard error over the seeds, of which there are
two: a difference within twice its error is no evidence, and the notes say so. Tiny models and defaults: this is about
mechanisms and is no ranking.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import part, taxonomy
from metier.core.batch import Rated
from metier.core.lossmodule import batch_type
from metier.core.runfolder import write_json
from metier.lab import preferencebench, wordpairs, words

NAMES = ("dpo", "ipo", "hinge", "exo", "sppo", "cdpo", "robust-dpo", "dr-dpo", "dpop", "rpo", "cal-dpo", "apo-zero", "nca",
         "r-dpo", "ln-dpo", "simpo", "orpo", "cpo", "kto", "bco")  # fmt: skip
PARTS = tuple(f"objective/{n}" for n in NAMES)
CLAIM = "Each variant of DPO changes one piece of the loss, for one fault of data or behaviour."
STRESSORS: dict[str, dict[str, Any]] = {
    "clean": {}, "flipped": {"flip": 0.3}, "long": {"length_bonus": wordpairs.LONG_BONUS}, "other words": {"synonyms": 1.0},
}  # fmt: skip
KEPT = ("gold_reward", "gold_sd", "length", "kl", "degenerate", "gold_accuracy", "chosen_change", "rejected_change")
STEPS, BATCH = 64, 32
Table = Mapping[tuple[str, str], Sequence[Mapping[str, float]]]
"""Figures of each objective on each kind of data, one a seed."""


def run(study: Study) -> Outcome:
    """All objectives on all data."""
    names = ("dpo", "cdpo", "ln-dpo", "rpo", "kto") if study.quick else NAMES
    seeds = (0,) if study.quick else (0, 1)
    table = {(n, s): [_figures(study, n, s, seed) for seed in seeds] for n in names for s in STRESSORS}
    rows = {n: {s: {k: [r[k] for r in table[n, s]] for k in KEPT} for s in STRESSORS} for n in names}
    shown = ["objective: gold reward on " + ", ".join(STRESSORS)]
    shown += [f"{n}: " + ", ".join(f"{np.mean(rows[n][s]['gold_reward']):.2f}" for s in STRESSORS) for n in names]
    shown.append("Mechanisms on a tiny model with default options: no ranking.")
    if not study.quiet:
        print("\n".join(shown))
    checks, doubts = judged(table, names)
    return Outcome(checks, {"table": rows}, [*shown, *doubts])


def judged(table: Table, names: Sequence[str]) -> tuple[list[Check], list[str]]:
    """The three predictions, and which of the differences are within their noise."""
    record = {n: taxonomy.traits(n) for n in names}

    def of(name: str, stressor: str, key: str) -> np.ndarray:
        return np.array([r[key] for r in table[name, stressor]])

    lost = {n: of(n, "clean", "gold_reward") - of(n, "flipped", "gold_reward") for n in names}
    grown = {n: of(n, "long", "length") - of(n, "clean", "length") for n in names}
    kept = {n: -of(n, "clean", "chosen_change") for n in names}
    checks, doubts = [], []
    for tag, what, values in (
        ("data/quality/noise", "gold reward lost to flipped labels", lost),
        ("model/generation/length", "tokens added by confounded labels", grown),
        ("model/optimisation/likelihood", "fall of the chosen answers' log-probability", kept),
    ):
        tagged = [n for n in names if tag in record[n].declared]
        over = np.mean([values[n] for n in tagged], axis=0) - values["dpo"]
        mean, error = float(over.mean()), float(over.std(ddof=1) / np.sqrt(len(over))) if len(over) > 1 else float("nan")
        text = f"{what}, {', '.join(tagged)} less dpo, with its standard error over seeds"
        checks.append(Check(text, "< 0", f"{mean:.4g} ± {error:.2g}", mean < 0))
        if not abs(mean) > 2 * error:
            doubts.append(f"No evidence either way, within twice the standard error: {what}.")
    return checks, doubts


def batch(name: str) -> int:
    """Units of a step, so that it has 64 answers: pairs, or single answers."""
    return 2 * BATCH if batch_type(part.build("objective", name).obj) is Rated else BATCH


def _figures(study: Study, name: str, stressor: str, seed: int) -> Mapping[str, float]:
    """Figures of one run, read back when there are any."""
    own = f"{name}-{stressor.replace(' ', '-')}-{seed}"
    path = study.folder / "figures" / f"{own}.json"
    if not path.is_file():
        units = batch(name)
        # Reference scores are of the start: objectives that read pairs share them. Single answers differ in what goes with them.
        shared = (study.folder / "scores" / f"{stressor.replace(' ', '-')}-{seed}").resolve()
        scores = str(shared) if units == BATCH else "live"
        prompts, held_out = _measured()
        size: dict[str, Any] = {"steps": 2, "samples": 8} if study.quick else {"steps": STEPS, "samples": 128}
        found = preferencebench.train(
            name, _data(study.folder, study.quick, stressor, seed), lr=1e-3, seed=seed, folder=study.folder / own, batch=units,
            prompts=prompts, held_out=held_out, overrides=[f"reference_scores={scores}"], **size,
        )[1]  # fmt: skip
        write_json(path, found)
    return {k: float("nan") if v is None else v for k, v in json.loads(path.read_text(encoding="utf-8")).items()}


@cache
def _data(folder: Path, quick: bool, stressor: str, seed: int) -> str:
    """The file of the pairs of a kind and a seed."""
    path = folder / f"pairs-{stressor.replace(' ', '-')}-{seed}.jsonl"
    rows = wordpairs.pairs(64 if quick else STEPS * BATCH, f"survey {stressor} {seed}", **STRESSORS[stressor])
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@cache
def _measured() -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts and pairs of the figures."""
    return words.prompts(64, "survey", split="held-out"), wordpairs.pairs(200, "survey", split="held-out")
