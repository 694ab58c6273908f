"""``metier eval TARGET``: loss and accuracy on a data set."""

import typer

app = typer.Typer()


@app.command(name="eval")
def evaluate(
    target: str = typer.Argument(..., help="A run folder, a run file, or a model."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Changes to the run file."),
    data: str | None = typer.Option(None, "--data", help="Held-out data: file, folder, lab/… or hub id."),
    format: str = typer.Option("auto", "--format", help="Format of --data."),
    limit: int | None = typer.Option(None, "--limit", min=1, help="At most this many examples."),
    objective: str | None = typer.Option(None, "--objective", help="Objective for a bare model (default: by the data)."),
    reward: str | None = typer.Option(
        None, "--reward", help="Let the model answer held-out prompts; judge with this reward part."
    ),
    answers: int = typer.Option(
        0, "--answers", min=0, help="Answers to each held-out prompt (KL, length; default 4 with --reward)."
    ),
    prompts: int = typer.Option(64, "--prompts", min=1, help="At most this many prompts are answered."),
    max_new_tokens: int = typer.Option(64, "--max-new-tokens", min=1, help="Longest answer."),
    tasks: str | None = typer.Option(None, "--tasks", help="Tasks of lm-evaluation-harness, comma-separated (extra: eval)."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Evaluate a run as it ended, a run file as it starts, or a model with --data."""
    from metier.cli.output import emit_json, table
    from metier.core import evaluate as evaluation
    from metier.core.yamlfile import parse_value

    if tasks:
        found = evaluation.harness(target, tasks.split(","), limit)
    else:
        generate = None
        if reward or answers:
            generate = evaluation.Generate(parse_value(reward) if reward else None, prompts, answers or 4, max_new_tokens)
        found = evaluation.evaluate(
            target, overrides or (), data=data, format=format, limit=limit, objective=objective, generate=generate
        )
    if json:
        return emit_json(found)
    return table(["measure", "value"], [[k, _shown(v)] for k, v in found.items() if v is not None])


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(_shown(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_shown(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
