"""``metier schedule wsd --steps 10000``: what convex theory advises about a schedule, before anything is trained."""

from typing import Any

import typer

app = typer.Typer()


@app.command()
def schedule(
    name: str = typer.Argument(..., help="A schedule, such as wsd (metier list schedule)."),
    options: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Options of the schedule, warmup among them."),
    steps: int = typer.Option(10_000, "--steps", min=2, help="Optimizer steps of the run."),
    lr: float | None = typer.Option(None, "--lr", help="Peak learning rate tuned for this schedule; else factors are printed."),
    longer: int | None = typer.Option(None, "--longer", help="Also: how to go on to so many steps from the plateau."),
    tokens_per_step: float = typer.Option(0.0, "--tokens-per-step", help="For schedules that count tokens."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Predict the best peak learning rate of every schedule from that of one, and how good each can be."""
    from metier.cli.output import emit_json
    from metier.cli.output import table as show
    from metier.core.advice import advise
    from metier.core.errors import UsageError
    from metier.core.yamlfile import parse_value

    given: dict[str, Any] = {}
    for text in options or []:
        key, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"{text!r} is not of the form key=value")
        given[key] = parse_value(value)
    found = advise({name: given}, steps, lr=lr, longer=longer, tokens_per_step=tokens_per_step)
    if json:
        return emit_json(found)
    print(f"{steps:,} steps; a bound of 1 is that of the best schedule there is (convex theory, arXiv:2501.18965)")
    head = ["schedule", "peak lr" if lr else "peak lr relative to the first", "bound"]
    show(head, [head, *([r["schedule"], f"{r['lr']:.3g}", f"{r['bound']:.3f}"] for r in found["schedules"])])
    if longer is not None:
        e = found["longer"]
        print(f"to go on to {longer:,} steps at the same peak: a cooldown over the last {e['cooldown']:.1%},")
        print(f"or from step {e['plateau_from_step']:,.0f} on {e['plateau']:.3f} of the peak and the old cooldown fraction")
    return None
