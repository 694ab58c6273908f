"""``metier probe NAME RUN``: measure the model of a run."""

from pathlib import Path
from typing import Any

import typer

app = typer.Typer()


@app.command()
def probe(
    name: str = typer.Argument(..., help="A probe, such as calibration (metier list probe)."),
    run: Path = typer.Argument(..., help="A run file (the model as it starts) or a run folder (as it ended)."),
    changes: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Options of the probe, and changes to the run file."
    ),
    on: str = typer.Option("auto", "--on", help="Data: eval, train, or auto (held-out data when there are any)."),
    batches: int | None = typer.Option(None, "--batches", min=1, help="At most this many micro-batches."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Measure a model on the data of a run; nothing in the run's folder changes."""
    import tempfile

    from metier.cli.output import emit_json
    from metier.core import probing
    from metier.core.errors import unknown
    from metier.core.session import open_session

    if on not in ("auto", "eval", "train"):
        raise unknown("kind of data", on, ("auto", "eval", "train"), where="--on")
    built, overrides = _build(name, changes or [])
    settings, document = _settings(run, overrides)
    with (
        tempfile.TemporaryDirectory() as aside,
        open_session(settings, document, Path(aside), quiet=True, handle_signals=False) as session,
    ):
        step = _resume(session, run)
        seen = probing.probe_session(session, on=on, batches=batches, folder=run if run.is_dir() else None)
        with probing.as_evaluated(session), probing.undisturbed(seen):
            found = built.obj(seen)
        data = {"layouts": len(seen.layouts), "examples": sum(len(x.ids) for x in seen.layouts)}
    if json:
        emit_json({"probe": built.id, "run": str(run), "step": step, **data, "result": found})
    else:
        where = "before training" if step is None else f"after step {step}"
        print(f"{built.id} of {run} {where}, on {data['examples']} examples")
        _print(found)


def _build(name: str, changes: list[str]) -> tuple[Any, list[str]]:
    """The probe with its options, and the changes that are for the run file."""
    from metier.core import part
    from metier.core.config import Run
    from metier.core.errors import UsageError, unknown
    from metier.core.yamlfile import parse_value

    schema = part.options(part.load(name, "probe"))
    own: dict[str, Any] = {}
    for text in changes:
        key, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"{text!r} is not of the form key=value")
        if key in schema:
            own[key] = parse_value(value)
        elif key.split(".")[0] not in Run.model_fields:
            raise unknown(f"option of probe/{name} or key of the run file", key, [*schema, *Run.model_fields])
    return part.build("probe", {name: own}), [t for t in changes if t.partition("=")[0] not in schema]


def _settings(run: Path, overrides: list[str]) -> Any:
    import json as jsonlib

    from metier.core import config
    from metier.core.errors import UsageError

    if not run.is_dir():
        return config.load(run, overrides)
    record = run / "run.json"
    if not record.is_file():
        raise UsageError(f"{run} is not a run folder: it has no run.json")
    return config.load(jsonlib.loads(record.read_text(encoding="utf-8"))["run"], overrides)


def _resume(session: Any, run: Path) -> int | None:
    """Load the newest checkpoint of a run folder. Raises ``UsageError`` when there is none."""
    from metier.core import checkpoint
    from metier.core.basegrad import start_adapters
    from metier.core.errors import UsageError

    if not run.is_dir():
        start_adapters(session)
        return None
    aside, session.context.folder = session.context.folder, run
    step = checkpoint.resume(session)
    session.context.folder = aside
    if step is None:
        raise UsageError(f"{run} holds no complete checkpoint")
    return step


def _print(found: dict[str, Any]) -> None:
    from metier.cli.output import table

    plain = {k: v for k, v in found.items() if not isinstance(v, list | dict) and v is not None}
    table(["measure", "value"], [[k, f"{v:.5g}" if isinstance(v, float) else v] for k, v in plain.items()])
    for name, rows in found.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            print(f"\n{name}: {', '.join(rows[0])}")
            shown = [[f"{v:.4g}" if isinstance(v, float) else v for v in r.values()] for r in rows]
            table(list(rows[0]), shown)
