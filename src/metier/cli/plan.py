"""``metier plan RUN.yaml``: what a run will do and need."""

from pathlib import Path
from typing import Any

import typer

app = typer.Typer()


@app.command()
def plan(
    run: Path = typer.Argument(..., help="The run file."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Changes to the run file."),
    step: bool = typer.Option(True, "--step/--no-step", help="Run one worst-case and two ordinary steps to measure."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Resolve and check a run file, preview its data, and measure memory and time on its longest step."""
    from metier.cli.output import emit_json
    from metier.core.plan import plan as make_plan

    found = make_plan(run, overrides or (), step=step)
    if json:
        return emit_json({k: v for k, v in found.items() if k != "preview_text"})
    return _show(found)


def _show(found: dict[str, Any]) -> None:
    from metier.cli.output import table

    print("parts")
    table(["part", "options"], [[f"  {p}", ", ".join(f"{k}={v}" for k, v in o.items())] for p, o in found["parts"].items()])
    print("\ndata")
    for text in found["notices"]:
        print(f"  {text}")
    table(["", ""], [[f"  {k}", _number(v)] for k, v in found["data"].items() if v is not None])
    print("\npreview: tokens that carry loss stand between ⟦ and ⟧\n")
    print("\n\n".join(found["preview_text"]))
    print("\nmemory")
    sizes = {k: v for k, v in found["memory"].items() if k not in ("parameters", "trainable")}
    table(["", ""], [[f"  {k}", f"{v / 2**20:.1f} MiB"] for k, v in sizes.items()])
    print(f"  {found['memory']['trainable']:,} of {found['memory']['parameters']:,} parameters are trained")
    if "time" in found:
        print("\ntime")
        table(["", ""], [[f"  {k}", _seconds(v)] for k, v in found["time"].items()])


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) and value < 10 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 60 else f"{value // 60:.0f} min {value % 60:.0f} s"
