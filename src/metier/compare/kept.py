"""The folder of a study: figures kept there are of the code that runs now, and the time of all calls is summed.

``kept.json`` in the folder holds the hash of everything the study is computed by (``sources``, the packages beneath, whether it
was quick) and the seconds of all calls so far. A folder of other code is renamed before the study starts.
"""

import ast
import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from metier.catalog.hashing import code_hash
from metier.core import part
from metier.core.errors import UsageError
from metier.core.runfolder import environment, write_json

NAME = "kept.json"
BEAT = 20.0
"""Seconds between two writings of the time: a call that is killed loses no more."""
PACKAGE = Path(__file__).resolve().parents[1]
BOOKS = (PACKAGE / "catalog", PACKAGE / "compare" / "study.py", PACKAGE / "compare" / "kept.py")
"""What only writes down what was seen."""


@dataclass
class Kept:
    """A folder in use."""

    folder: Path
    code: str
    before: float
    """Seconds of earlier calls."""
    began: float

    @property
    def seconds(self) -> float:
        """Of all calls."""
        return self.before + time.monotonic() - self.began

    def write(self) -> None:
        """Store the time."""
        write_json(self.folder / NAME, {"code": self.code, "seconds": round(self.seconds, 1)})


@contextmanager
def kept(folder: Path, code: str, *, own: bool = True, quiet: bool = False) -> Iterator[Kept]:
    """The folder, emptied of what other code made: that is renamed to ``<folder>.other-code-<n>``, and said so.

    ``own`` says that the folder's place is the study's own. Another that has files but no ``kept.json`` is somebody's:
    ``UsageError``.
    """
    known = _read(folder / NAME)
    filled = folder.is_dir() and any(folder.iterdir())
    if filled and known is None and not own:
        raise UsageError("the folder has files that no study made", where=str(folder), hint="name a new or an empty folder")
    if filled and (known is None or known["code"] != code):
        aside = _set_aside(folder)
        known = None
        if not quiet:
            print(f"What other code computed in {folder} is not used: moved to {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    used = Kept(folder, code, known["seconds"] if known else 0.0, time.monotonic())
    used.write()
    with _beating(used):
        yield used


@contextmanager
def _beating(used: Kept) -> Iterator[None]:
    """Write the time every now and then, and at the end whatever happens."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            used.write()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        used.write()


def _read(path: Path) -> dict[str, Any] | None:
    """What is kept; ``None`` without a file that says so."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"code": str(found["code"]), "seconds": float(found["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _set_aside(folder: Path) -> Path:
    folder = folder.resolve()
    number = 1
    while (aside := folder.with_name(f"{folder.name}.other-code-{number}")).exists():
        number += 1
    return folder.rename(aside)


# --- what a study is computed by -------------------------------------------------------------------------------------


def stamp(sources: Iterable[Path], quick: bool) -> str:
    """A hash of the sources, of the versions of packages, and of the size."""
    packages = environment()["packages"]
    return hashlib.sha256(json.dumps([code_hash(sources), packages, quick], sort_keys=True).encode()).hexdigest()


def sources(start: Iterable[Path]) -> set[Path]:
    """The files themselves, what they import of metier, inside functions too, and so on.

    Parts are found by name, so every part whose name or id stands as a text in one of the files counts too.
    """
    found: set[Path] = set()
    waiting = [p.resolve() for p in start]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _beside(path)
    return {p for p in found if not any(p.is_relative_to(b) for b in BOOKS)}


@cache
def _named_parts() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for item in part.listing():
        for name in (item.id, item.name):
            found.setdefault(name, []).append(Path(item.path).resolve())
    return found


def _beside(path: Path) -> Iterator[Path]:
    """Files that a file needs."""
    if path.suffix != ".py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from _module(node.module)
            for alias in node.names:
                yield from _module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _named_parts().get(node.value, ())


def _module(name: str) -> Iterator[Path]:
    """The file of a module of metier; none for a name inside one."""
    first, *rest = name.split(".")
    if first == "metier":
        place = PACKAGE.joinpath(*rest)
        yield from (p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file())
