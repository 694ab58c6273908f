"""Text that comes with Python: its reference documentation, docstrings and sources, with module paths as metadata.

Names: ``lab/pydoc`` (documentation topics and docstrings), ``lab/stdlib`` (sources), ``lab/python`` (both). The
content depends on the Python version; every run records its fingerprint.
"""

import ast
import contextlib
import hashlib
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from metier.core.errors import unknown
from metier.lab.tasks import TASKS

SOURCE_BYTES = 2_000_000
"""Sources used, in the order of their paths: enough for the lab, small enough to tokenise in seconds."""
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "pydoc_data",
    "encodings",
    "turtledemo",
}


@cache
def documents(name: str) -> tuple[dict[str, str], ...]:
    """Documents of a corpus, ``{"text", "path"}`` each, or rows of a task (``metier.lab.tasks``), in a fixed order.

    Raises ``UsageError`` for an unknown name.
    """
    makers = {"pydoc": _documentation, "stdlib": _sources, "python": lambda: [*_documentation(), *_sources()]}
    short = name.removeprefix("lab/")
    if short in TASKS:
        return tuple(TASKS[short]())
    if short not in makers:
        raise unknown("lab corpus", name, [f"lab/{m}" for m in (*makers, *TASKS)])
    return tuple(_cached(short, makers[short]))


def _cached(name: str, make: Callable[[], list[dict[str, str]]]) -> list[dict[str, str]]:
    """Parsing the standard library takes seconds, so the documents are kept for this Python version."""
    from metier.core.cache import cache_folder
    from metier.core.runfolder import write_json

    key = hashlib.sha256(f"{sys.version} {SOURCE_BYTES} {Path(__file__).read_text(encoding='utf-8')}".encode()).hexdigest()[:16]
    path = cache_folder() / "lab" / f"{name}-{key}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = make()
    with contextlib.suppress(OSError):
        write_json(path, found)
    return found


def _documentation() -> list[dict[str, str]]:
    from pydoc_data.topics import topics

    found = [{"text": text, "path": f"topics/{topic}"} for topic, text in sorted(topics.items())]
    for path, source in _files():
        text = "\n\n".join(_docstrings(source))
        if len(text) > 400:
            found.append({"text": text, "path": f"docstrings/{path}"})
    return found


def _sources() -> list[dict[str, str]]:
    found, total = [], 0
    for path, source in _files():
        if total >= SOURCE_BYTES:
            break
        if len(source) > 400:
            found.append({"text": source, "path": path})
            total += len(source)
    return found


@cache
def _files() -> tuple[tuple[str, str], ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not LEFT_OUT.intersection(relative.parts):
            try:
                found.append((relative.as_posix(), path.read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError):
                continue
    return tuple(found)


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield text
