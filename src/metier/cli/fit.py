"""``metier fit LAW TABLE``: fit a scaling law, with intervals and a check at held-out scale."""

from pathlib import Path
from typing import Any

import typer

app = typer.Typer()


@app.command()
def fit(
    law: str = typer.Argument(..., help="A law, such as chinchilla (metier list law)."),
    table: Path = typer.Argument(
        ..., help="A .csv with header or a .jsonl, one row per run; or a folder of runs, whose steps are rows."
    ),
    options: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Options of the law; OUR_COLUMN=YOUR_COLUMN renames."
    ),
    holdout: str | None = typer.Option(
        None, "--holdout", help="Predict these rows from the others: a share of the largest (0.2), or N>=1e9."
    ),
    starts: int = typer.Option(24, "--starts", min=1, help="Starting points that are optimised."),
    bootstrap: int = typer.Option(200, "--bootstrap", min=0, help="Resamples behind the intervals."),
    seed: int = typer.Option(0, "--seed", help="Seed of the resamples."),
    at: float | None = typer.Option(
        None,
        "--at",
        help="Training FLOPs (or what the law counts in) for which to print the optimum, where the law has one.",
    ),
    plot: Path | None = typer.Option(None, "--plot", help="Write observed against predicted as SVG."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Fit a law to a table of runs."""
    from metier.cli.output import emit_json
    from metier.core import laws
    from metier.core.errors import UsageError

    built, renamed = _build(law, options or [])
    rows = laws.read_table(table, renamed, (*built.obj.inputs, built.obj.output))
    result = laws.fit(built.obj, rows, starts=starts, bootstrap=bootstrap, seed=seed, holdout=holdout)
    if at is not None and not hasattr(built.obj, "optimal"):
        raise UsageError(f"{built.id} has no optimum to print", where="--at")
    optimum = None if at is None else built.obj.optimal(result.theta, at)
    derived = built.obj.derived(result.theta) if hasattr(built.obj, "derived") else None
    if plot is not None:
        plot.write_text(laws.plot(result, title=f"{built.id}: {table.name}"), encoding="utf-8")
    if json:
        emit_json({"law": built.id, "table": str(table), **result.to_dict(), "derived": derived, "optimum": optimum})
    else:
        _print(built.id, table, result)
        if derived:
            print(", ".join(f"{k} {v:.4g}" for k, v in derived.items()))
        if optimum:
            unit = getattr(built.obj, "at_unit", "FLOPs")
            print(f"at {at:.3g} {unit}: " + ", ".join(f"{k} {v:.4g}" for k, v in optimum.items()))


def _build(law: str, given: list[str]) -> tuple[Any, dict[str, str]]:
    """The law with its options, and which columns are renamed."""
    from metier.core import part
    from metier.core.errors import UsageError
    from metier.core.yamlfile import parse_value

    cls = part.load(law, "law")
    wanted = {*cls.inputs, cls.output}
    own: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"{text!r} is not of the form key=value")
        if key in wanted:
            renamed[key] = value
        else:
            own[key] = parse_value(value)
    return part.build("law", {law: own}), renamed


def _print(id: str, table: Path, result: Any) -> None:
    from metier.cli.output import table as show

    spread = (sum(r * r for r in result.residuals) / result.rows) ** 0.5
    print(f"{id} on {table.name}: {result.rows} rows, typical error {100 * spread:.3g} %")
    rows = [
        [name, f"{value:.5g}", f"[{low:.5g}, {high:.5g}]" if result.resamples else ""]
        for name, value, low, high in zip(result.names, result.values, result.low, result.high, strict=True)
    ]
    show(["parameter", "value", "95 % interval"], rows)
    if result.at_bound:
        print(f"not determined by these rows (on a bound): {', '.join(result.at_bound)}")
    if result.agreeing < 0.5:
        print(f"only {100 * result.agreeing:.0f} % of the starts agree: other solutions fit about as well")
    if result.held_out:
        h = result.held_out
        print(f"held out ({h['rule']}): {h['rows']} rows, mean error {100 * h['mean_relative_error']:.3g} %, "
              f"worst {100 * h['worst_relative_error']:.3g} %, bias {100 * h['bias']:+.3g} %")  # fmt: skip
