"""``metier merge METHOD FOLDER… --out OUT [option=value …]``."""

import re
from pathlib import Path

import typer

app = typer.Typer()
OPTION = re.compile(r"([a-z][a-z0-9_]*)=(.*)", re.DOTALL)


@app.command()
def merge(
    method: str = typer.Argument(..., help="A merge part, e.g. average; see: metier list merge."),
    inputs: list[str] = typer.Argument(
        ...,
        metavar="FOLDER... [OPTION=VALUE]...",
        help="Model folders, checkpoints or .safetensors files, in order.",
    ),
    out: Path = typer.Option(..., "--out", "-o", help="Model folder to write; must not exist."),
    base: Path | None = typer.Option(None, "--base", help="The model that the merged ones came from."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Merge models or checkpoints, tensor by tensor, in the order written."""
    from metier.cli.output import emit_json
    from metier.core import merging, part

    options = dict(_option(i) for i in inputs if _is_option(i))
    folders = [i for i in inputs if not _is_option(i)]
    built = part.build("merge", {method: options})
    done = merging.merge(built, folders, out, base=base)
    if json:
        return emit_json({"folder": str(done.folder), **done.card})
    print(f"{built.id} of {len(folders)} models, {done.card['tensors']} tensors\nresult in {done.folder}")
    if done.card["config_differs"]:
        keys = ", ".join(done.card["config_differs"])
        print(f"  the configurations differ in {keys}; the first model's is kept")
    if done.card["files_from"] is None:
        print("  no configuration was found beside the inputs: only the weights were written")
    return None


def _is_option(text: str) -> bool:
    return OPTION.fullmatch(text) is not None and not Path(text).exists()


def _option(text: str) -> tuple[str, object]:
    from metier.core.yamlfile import parse_value

    name, value = OPTION.fullmatch(text).groups()  # type: ignore[union-attr]
    return name, parse_value(value)
