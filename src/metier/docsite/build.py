"""From facts to files: the Markdown of every page, then the site."""

import re
import shutil
from pathlib import Path

from metier.core.errors import MetierError, UsageError
from metier.docsite import commands, extra, partpages, rowpages, runfile
from metier.docsite.facts import Facts, gather

ASSETS = Path(__file__).parent / "assets"
TOP = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def pages(facts: Facts) -> dict[str, str]:
    """Every page as Markdown, by its path in the site."""
    written = {p.name: p.read_text(encoding="utf-8") for p in sorted((facts.root / "docs").glob("*.md"))}
    top = {new: (facts.root / old).read_text(encoding="utf-8") for old, new in TOP.items()}
    return {
        **{name: _moved(text) for name, text in (written | top).items()},
        "index.md": extra.home(facts),
        "recipes.md": extra.recipes(facts),
        "findings.md": extra.findings(facts),
        "leaderboards.md": extra.leaderboards(facts),
        "commands.md": commands.page(),
        "runfile.md": runfile.page(),
        **partpages.pages(facts),
        **rowpages.pages(facts),
    }


def _moved(text: str) -> str:
    """Links between the files of the checkout become links between the pages of the site."""
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text)
    text = re.sub(r"\]\((?:\.\./)?recipes/[^)]*\)", "](recipes.md)", text)
    for old, new in TOP.items():
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(old)}", f"]({new}", text)
    return text


def write(folder: Path, facts: Facts | None = None) -> int:
    """Write all pages, pictures and styles into ``folder``, emptied first; returns the number of pages."""
    facts = facts or gather()
    if folder.exists():
        shutil.rmtree(folder)
    written = pages(facts)
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copytree(ASSETS, folder / "assets")
    if (facts.root / "docs" / "images").is_dir():
        shutil.copytree(facts.root / "docs" / "images", folder / "images")
    return len(written)


def build(out: Path, *, root: Path | None = None) -> int:
    """Build the site into ``out``; the number of pages. Raises ``UsageError`` without mkdocs-material."""
    config = configuration(root)
    count = write(Path(config["docs_dir"]), gather(root))
    config["site_dir"] = str(out.resolve())
    from mkdocs.commands import build as mkdocs
    from mkdocs.exceptions import Abort

    try:
        config.plugins.on_startup(command="build", dirty=False)
        mkdocs.build(config)
    except Abort as e:
        raise MetierError(f"the site could not be built: {e}") from e
    return count


def configuration(root: Path | None = None):
    """The settings of ``mkdocs.yml``, with the folder of generated pages made."""
    try:
        from mkdocs.config import load_config
    except ImportError:
        hint = "Install it: pip install 'metier[docs]'"
        raise UsageError("building the site needs mkdocs-material, which is not installed", hint=hint) from None
    root = gather(root).root
    (root / "build" / "docs").mkdir(parents=True, exist_ok=True)
    return load_config(str(root / "mkdocs.yml"), strict=True)
