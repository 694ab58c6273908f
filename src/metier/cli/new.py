"""``metier new KIND NAME``: the two files of a part."""

from pathlib import Path

import typer

app = typer.Typer()
TEMPLATES = Path(__file__).parent / "templates"


@app.command()
def new(
    kind: str = typer.Argument(..., help="The kind, such as optimizer."),
    name: str = typer.Argument(..., help="The part's name, such as my-trick."),
    root: Path = typer.Option(Path(), "--root", help="The checkout, or the root of your own package."),
) -> None:
    """Write a part and its oracle test, with the blanks to fill."""
    import keyword
    import re

    from metier.core.errors import UsageError, unknown
    from metier.core.part import KINDS, listing

    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    name = name.lower().replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UsageError(f"{name!r} is not a part name: letters, digits and single dashes")
    if keyword.iskeyword(name):
        raise UsageError(f"{name!r} cannot be the name of a function in Python")
    if any(p.id == f"{kind}/{name}" for p in listing()):
        raise UsageError(f"{kind}/{name} exists already", hint=f"See: metier show {kind}/{name}")
    stem = name.replace("-", "_")
    part = root / "src" / "metier" / "parts" / kind / f"{stem}.py"
    test = root / "tests" / "parts" / kind / f"test_{stem}.py"
    for path in (part, test):
        if path.exists():
            raise UsageError(f"{path} exists already")
        if not path.parent.is_dir():
            raise UsageError(f"no folder {path.parent}", hint="Run this in a checkout of metier, or give --root.")
    words = {"{kind}": kind, "{name}": name, "{stem}": stem, "{Class}": "".join(w.title() for w in name.split("-"))}
    for path, template in ((part, f"{kind}.txt"), (test, f"test_{kind}.txt")):
        source = TEMPLATES / template if (TEMPLATES / template).exists() else TEMPLATES / "test_any.txt"
        text = source.read_text(encoding="utf-8")
        for blank, word in words.items():
            text = text.replace(blank, word)
        path.write_text(text, encoding="utf-8")
        print(path)
    print(f"Fill the blanks, then: metier check {kind}/{name}")
