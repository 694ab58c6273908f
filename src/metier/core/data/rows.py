"""Raw rows: dicts as they stand in a file, a folder, the lab or on the hub, each knowing its place."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from metier.core.data import readers
from metier.core.data.readers import DATA, TEXT, Problems, Row
from metier.core.errors import UsageError, nearest

Place = tuple[str, int]
"""File name and 1-based line, list index or row; 0 when the file as a whole is the row."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Rows(Sequence[Row]):
    """A sequence of dict rows that remembers the file and line of each.

    ``name`` is the short origin for messages; ``notices`` are sentences about how the rows were read.
    """

    def __init__(self, rows: Sequence[Row], places: Sequence[Place], name: str, notices: Iterable[str] = ()) -> None:
        self._rows, self._places, self.name, self.notices = rows, places, name, tuple(notices)

    @classmethod
    def of(cls, rows: Iterable[Row], name: str = "rows") -> "Rows":
        """Rows made in memory, counted from 1."""
        held = list(rows)
        return cls(held, [(name, i + 1) for i in range(len(held))], name)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        return self.select(range(len(self))[i]) if isinstance(i, slice) else self._rows[i]

    def __repr__(self) -> str:
        return f"Rows({self.name!r}, {len(self)} rows)"

    def where(self, i: int) -> str:
        """The place to look for row ``i``, such as ``train.jsonl row 17``."""
        file, row = self._places[i]
        return f"{file} row {row}" if row else file

    def id(self, i: int) -> str:
        """Identity of row ``i``, ``file:row``: the same for any selection that holds it."""
        file, row = self._places[i]
        return f"{file}:{row}" if row else file

    def select(self, indices: Iterable[int]) -> "Rows":
        """The rows at ``indices``, in that order."""
        chosen = list(indices)
        return Rows([self._rows[i] for i in chosen], [self._places[i] for i in chosen], self.name, self.notices)

    def head(self, n: int) -> "Rows":
        """The first ``n`` rows."""
        return self.select(range(min(n, len(self))))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over content and order; the file's place and kind and the order of keys do not matter."""
        total = hashlib.sha256()
        for row in self._rows:
            text = json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
            total.update(hashlib.sha256(text.encode()).digest())
        return total.hexdigest()


def open_rows(
    where: str,
    *,
    split: str | None = None,
    columns: Mapping[str, str] = {},
    limit: int | None = None,
    problems: Problems | None = None,
) -> Rows:
    """Open a file, a folder, ``lab/<name>`` or a hub id ``org/name[:config]``.

    ``columns`` is ``{expected: theirs}``; ``limit`` keeps the first rows. Unreadable rows raise one
    ``UsageError`` that lists them, or are added to ``problems`` when it is given. Missing and empty
    sources always raise.
    """
    found = Problems() if problems is None else problems
    source, name, notices = _source(str(where), split, tuple(columns.values()), limit, found)
    rows, places = [], []
    for place, row in islice(source, limit):
        rows.append(row)
        places.append(place)
    if found.total and problems is None:
        raise found.error(name)
    if not rows and not found.total:
        raise UsageError(f"{name} holds no rows", where=str(where))
    if rows and columns:
        notices += _rename(rows, columns, name)
    return Rows(rows, places, name, notices)


Source = tuple[Iterator[tuple[Place, Row]], str, list[str]]


def _source(where: str, split: str | None, named: tuple[str, ...], limit: int | None, problems: Problems) -> Source:
    if where.startswith("lab/"):
        return _lab(where), where, []
    path = Path(where).expanduser()
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as e:  # a forbidden parent, a name too long
        raise UsageError(f"cannot be read: {e.strerror}", where=where) from None
    if folder:
        files, notices = _folder_files(path, split)
        return _read_folder(path, files, named, problems), path.resolve().name, notices
    if file:
        if split:
            raise UsageError(f"split = {split!r} has no meaning for one file", where=where, hint="Remove data.split.")
        return _in_file(readers.read(path, path.name, named, problems), path.name), path.name, []
    if _looks_local(where, path):
        raise _missing(where, path)
    from metier.core.data.hub import hub_rows

    return _in_file(hub_rows(where, split, limit), where), where, []


def _in_file(rows: Iterable[tuple[int, Mapping[str, Any]]], name: str) -> Iterator[tuple[Place, Row]]:
    return (((name, number), dict(row)) for number, row in rows)


def _lab(where: str) -> Iterator[tuple[Place, Row]]:
    from metier.lab.corpus import documents

    return _in_file(enumerate(documents(where.removeprefix("lab/")), start=1), where)


def _looks_local(where: str, path: Path) -> bool:
    plain = re.sub(r"\.gz$", "", path.name.lower())
    known = Path(plain).suffix in DATA | TEXT or plain != path.name.lower()
    return known or not HUB_ID.fullmatch(where) or where.startswith(("./", "../", "~")) or path.parent.is_dir()


def _missing(where: str, path: Path) -> UsageError:
    parent = path.parent
    if not parent.is_dir():
        return UsageError(f"there is no folder {parent}", where=where)
    close = nearest(path.name, sorted(p.name for p in parent.iterdir() if not p.name.startswith(".")))
    hint = f"Did you mean {str(parent / close)!r}?" if close else "Data is a file, a folder, lab/<name> or a hub id org/name."
    return UsageError("there is no such file or folder", where=where, hint=hint)


def _folder_files(folder: Path, split: str | None) -> tuple[list[Path], list[str]]:
    """Files to read, in the order of their relative paths, and what was left out."""
    visible = [
        p for p in folder.rglob("*")
        if p.is_file() and not any(q.startswith((".", "__pycache__")) for q in p.relative_to(folder).parts)
    ]  # fmt: skip
    files = sorted(visible, key=lambda p: p.relative_to(folder).as_posix())
    tables = [p for p in files if readers.kind(p) in DATA - {".json"}]
    texts = [p for p in files if readers.kind(p) in TEXT]
    if tables:  # a data card beside the data is not data
        texts = [p for p in texts if p.stem.lower() not in ("readme", "license", "licence", "changelog")]
    # .json beside other files is usually configuration, so it counts only where there is nothing else
    chosen = sorted(tables + texts, key=files.index) or [p for p in files if readers.kind(p) == ".json"]
    if split:
        chosen = [p for p in chosen if split.lower() in re.split(r"[^a-z0-9]+", p.relative_to(folder).as_posix().lower())]
    if not chosen:
        what = f"no file of split {split!r}" if split else f"no file with one of {', '.join(sorted(DATA | TEXT))}"
        raise UsageError(f"the folder has {what}", where=str(folder))
    left = len(files) - len(chosen)
    return chosen, [f"{folder.name}: {left} of {len(files)} files are not read as data"] if left else []


def _read_folder(folder: Path, files: list[Path], named: tuple[str, ...], problems: Problems) -> Iterator[tuple[Place, Row]]:
    base = folder.resolve().name
    for path in files:
        relative = path.relative_to(folder).as_posix()
        if path.stat().st_size == 0 and readers.kind(path) in TEXT:
            continue  # such as an empty __init__.py
        for number, row in readers.read(path, f"{base}/{relative}", named, problems):
            yield (f"{base}/{relative}", number), {**row, "path": relative} if number == 0 else row


def _rename(rows: list[Row], columns: Mapping[str, str], name: str) -> list[str]:
    """Rename keys in place; says where a mapping is not needed because the expected name is there."""
    seen = {key for row in rows for key in row}
    notices, needed = [], dict(columns)
    for expected, theirs in columns.items():
        if theirs in seen:
            continue
        close = nearest(theirs, sorted(seen))
        if expected not in seen or (close is not None and close != expected):
            hint = f"It has {', '.join(sorted(seen)[:20])}." + (f" Did you mean {close!r}?" if close else "")
            raise UsageError(f"columns: {expected}: {theirs} — there is no column {theirs!r}", where=name, hint=hint)
        notices.append(f"{name}: no column {theirs!r}; its {expected!r} is used as it stands")
        del needed[expected]
    for i, row in enumerate(rows):
        kept = {k: v for k, v in row.items() if k not in needed.values() and k not in needed}
        rows[i] = kept | {expected: row[theirs] for expected, theirs in needed.items() if theirs in row}
    return notices
