"""``metier meta RUN --out FILE``: learn the file that the optimizer of a run reads."""

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def meta(
    run: Path = typer.Argument(..., help="A run file whose optimizer learns a file, such as l3rs; with held-out data."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Changes to the run file."),
    out: Path = typer.Option(..., "--out", "-o", help="The .safetensors file to write; an unfinished one is continued."),
    iterations: int = typer.Option(40, "--iterations", min=1, help="In total, those of earlier starts included."),
    pairs: int = typer.Option(8, "--pairs", min=1, help="Antithetic pairs of an iteration: two runs each."),
    sigma: float = typer.Option(0.05, "--sigma", help="Standard deviation of the perturbations."),
    lr: float = typer.Option(0.01, "--lr", help="Step size of the search (Adam)."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the search and of its runs."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Learn the file of a run's optimizer from the final held-out losses of many such runs."""
    from dataclasses import asdict

    from metier.cli.output import emit_json
    from metier.core.evolution import Settings
    from metier.core.metatrain import metatrain

    def tell(seen: dict[str, float]) -> None:
        if not json:
            print(f"{seen['iteration']:4.0f}  loss {seen['mean']:.4f}  [{seen['lowest']:.4f}, {seen['highest']:.4f}]", flush=True)

    settings = Settings(sigma=sigma, pairs=pairs, lr=lr, seed=seed)
    found = metatrain(run, overrides or (), out=out, iterations=iterations, settings=settings, tell=tell)
    if json:
        emit_json({**asdict(found), "file": str(found.file)})
    else:
        print(f"{found.file}: learned from {found.runs} runs")
