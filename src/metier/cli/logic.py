"""``metier logic``: preference losses as programs: explained, read back from a ratio, listed, put in order."""

from typing import Any

import typer

app = typer.Typer(no_args_is_help=True, help="Preference losses as logic: explain, decompile, list, lattice.")
JSON = typer.Option(False, "--json", help="Machine-readable output.")


@app.command()
def explain(
    program: str = typer.Argument(..., help="A known program such as orpo, or a code such as '.+-.' (-- before a leading -)."),
    json: bool = JSON,
) -> None:
    """A program in full: formulas, ratio, what it entails."""
    _show(_programs().explain(program), json)


@app.command()
def decompile(
    ratio: str = typer.Argument(..., help="Probabilities pw pl (policy) and rw rl (reference): 'pw*(1-pl)/(pl*(1-pw))'."),
    json: bool = JSON,
) -> None:
    """The program behind a loss, from the ratio inside its logarithm."""
    _show(_programs().decompile(ratio), json)


@app.command("list")
def list_programs(
    strict: bool = typer.Option(False, "--strict", help="Only those that push one answer up and the other down at every point."),
    monotone: bool = typer.Option(False, "--monotone", help="Only those that never push the wrong way."),
    json: bool = JSON,
) -> None:
    """Every program over two answers that prefers anything."""
    from metier.cli.output import emit_json, table

    programs = _programs()
    found = [programs.explain(code) for code in programs.enumerate_codes(strict=strict, monotone=monotone)]
    if json:
        return emit_json(found)
    columns = ["code", "name", "implication", "ratio"]
    return table(columns, [[f[c] or "" for c in columns] for f in found], head=True)


@app.command()
def lattice(
    programs: list[str] = typer.Argument(None, help="Codes or names; by default the strict programs."),
    json: bool = JSON,
) -> None:
    """Which program is stricter than which: its loss is never below the other's."""
    from metier.cli.output import emit_json, table

    module = _programs()
    edges = module.lattice(programs or module.enumerate_codes(strict=True))
    if json:
        return emit_json([{"stricter": a, "than": b} for a, b in edges])
    return table(["stricter", "than"], edges, head=True)


def _programs() -> Any:
    """The module with the programs, found through the part it belongs to: commands import no part."""
    import importlib

    from metier.core import part

    package = part.find("objective/logic").module.rpartition(".")[0]
    return importlib.import_module(f"{package}._programs")


def _show(facts: dict[str, Any], json: bool) -> None:
    from metier.cli.output import emit_json, outline

    emit_json(facts) if json else print(outline({k: str(v) if isinstance(v, bool) else v for k, v in facts.items()}))
