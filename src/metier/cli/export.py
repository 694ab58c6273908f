"""``metier export RUN --merged OUT``."""

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def export(
    run: Path = typer.Argument(..., help="The run folder."),
    merged: Path | None = typer.Option(None, "--merged", help="Write a plain model folder here, the adapter merged."),
    adapter: Path | None = typer.Option(None, "--adapter", help="Write the adapter alone here."),
    prompt: list[str] = typer.Option([], "--prompt", help="Prompt to compare answers on; may be repeated."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Write a model folder, load it again, and prove that it answers as the trained model did; else leave
    nothing."""
    from dataclasses import asdict

    from metier.cli.output import emit_json
    from metier.core.errors import UsageError

    if (merged is None) == (adapter is None):
        raise UsageError("say what to write: --merged OUT (a plain model) or --adapter OUT (the adapter alone)")
    from metier.core.export import export as export_run

    done = export_run(run, merged or adapter or Path(), merged=merged is not None, prompts=prompt or None)
    if json:
        return emit_json({"folder": str(done.folder), "merged": done.merged, "proof": asdict(done.proof)})
    proof = done.proof
    print(
        f"loaded from disk and compared with the trained model at {proof.total.positions} positions: "
        f"greedy tokens agree at {proof.total.greedy:.1%}, KL divergence {proof.total.kl:.2g} nats\n"
        f"largest difference of a log-probability: {proof.merge.logp:.2g} by merging, {proof.disk.logp:.2g} by saving\n"
        f"result in {done.folder}"
    )
    return None
