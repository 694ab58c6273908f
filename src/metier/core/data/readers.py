"""Readers of file kinds: each yields ``(row number, row)`` and collects what it cannot read."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metier.core.errors import UsageError

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row]]

TEXT = {".txt", ".md", ".py"}
DATA = {".jsonl", ".json", ".csv", ".tsv", ".parquet"}
HEADER_NAMES = {
    "text", "label", "pair", "prompt", "completion", "chosen", "rejected", "question", "answer",
    "instruction", "input", "output", "sentence", "id", "idx",
}  # fmt: skip
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Problems:
    """Rows that cannot be used: the first ``keep`` with place and reason, and the number of all."""

    def __init__(self, keep: int | None = 10) -> None:
        self.keep, self.total = keep, 0
        self.shown: list[tuple[str, str]] = []

    def add(self, where: str, reason: str) -> None:
        """Note one bad row."""
        self.total += 1
        if self.keep is None or len(self.shown) < self.keep:
            self.shown.append((where, reason))

    def sentence(self, name: str, of: int) -> str:
        """What was left out, with the first places and their reasons."""
        shown = "; ".join(f"{where}: {reason}" for where, reason in self.shown[:3])
        more = "; …" if self.total > 3 else ""
        return f"{name}: {self.total} of {of} rows cannot be used and are left out ({shown}{more})"

    def error(self, name: str, of: int | None = None) -> UsageError:
        """One error that lists the rows."""
        out_of = f" of {of}" if of else ""
        lines = [f"{where}: {reason}" for where, reason in self.shown]
        if self.total > len(lines):
            lines.append(f"… and {self.total - len(lines)} more; metier data check lists all")
        rows = "row" if self.total == 1 and not of else "rows"
        return UsageError(f"{self.total}{out_of} {rows} cannot be used", where=name, hint="\n  ".join(lines))


def kind(path: Path) -> str:
    """Lower-case suffix without ``.gz``, such as ``.jsonl``."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read(path: Path, name: str, named: tuple[str, ...], problems: Problems) -> Numbered:
    """Rows of one file. ``named`` are column names the user knows: a first line with one is a header."""
    suffix = kind(path)
    if suffix not in TEXT | DATA:
        known = ", ".join(sorted(DATA | TEXT))
        raise UsageError(
            f"unknown kind of data file {suffix or path.name!r}",
            where=name,
            hint=f"Known: {known}, and .gz of these.",
        )
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            if stream.read(2) in UTF16:
                raise UsageError("the file is UTF-16", where=name, hint="Save it as UTF-8.")
            stream.seek(0)
            if suffix in TEXT:
                yield from _text(stream, name, path.name, problems)
            elif suffix == ".parquet":
                yield from _parquet(stream, name)
            elif suffix in (".csv", ".tsv"):
                yield from _table(stream, name, suffix == ".tsv", named, problems)
            else:
                yield from _json(stream, name, problems)
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise UsageError(f"the compressed file is damaged ({e})", where=name) from None
    except OSError as e:
        raise UsageError(f"cannot be read: {e.strerror or e}", where=name) from None


def _text(stream: BinaryIO | gzip.GzipFile, name: str, path: str, problems: Problems) -> Numbered:
    raw = stream.read()
    try:
        text = raw.removeprefix(BOM).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        return problems.add(name, _utf8(e))
    if "\0" in text:
        return problems.add(name, f"NUL character in line {text[: text.index(chr(0))].count(chr(10)) + 1}")
    if text.strip():
        yield 0, {"text": text, "path": path}
    return None


def _utf8(e: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 (byte 0x{e.object[e.start]:02x} at position {e.start + 1})"


def _json(stream: BinaryIO | gzip.GzipFile, name: str, problems: Problems) -> Numbered:
    """One object per line, or one list of objects, whatever the suffix says."""
    head = stream.read(1 << 16).removeprefix(BOM).lstrip()
    stream.seek(0)
    if head.startswith(b"["):
        whole = _whole(stream.read(), name)
        if isinstance(whole, list):
            return (yield from _objects(enumerate(whole, start=1), name, problems))
        stream.seek(0)
    elif head.startswith(b"{") and head.split(b"\n", 1)[0].strip() == b"{":
        raise UsageError(
            "one JSON object over several lines",
            where=name,
            hint="Data is one object per line, or a list of objects.",
        )
    for number, line in enumerate(stream, start=1):
        line = (line.removeprefix(BOM) if number == 1 else line).strip()
        if not line:
            continue
        value, reason = _parse(line)
        if reason:
            problems.add(f"{name} row {number}", reason)
        else:
            yield number, value
    return None


def _whole(raw: bytes, name: str) -> Any:
    """The list a file holds; ``None`` when it is lines that happen to start with a bracket."""
    try:
        return json.loads(raw.removeprefix(BOM).decode("utf-8"))
    except (ValueError, RecursionError) as e:
        first = raw.removeprefix(BOM).lstrip().split(b"\n", 1)[0]
        if _is_json(first):
            return None
        reason = _utf8(e) if isinstance(e, UnicodeDecodeError) else f"not JSON: {e}"
        raise UsageError(f"a list of rows that cannot be read: {reason}", where=name) from None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _objects(values: Any, name: str, problems: Problems) -> Numbered:
    for number, value in values:
        reason = _reason(value)
        if reason:
            problems.add(f"{name} row {number}", reason)
        else:
            yield number, value


def _parse(line: bytes) -> tuple[Any, str]:
    """The object of one line, and why it is none."""
    if b"\0" in line:
        return None, f"NUL byte at position {line.index(0) + 1}"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        return None, _utf8(e)
    except json.JSONDecodeError as e:
        return None, f"not JSON: {e.msg} at character {e.colno}"
    except RecursionError:
        return None, "not JSON: nested too deeply"
    # escapes that make unusable text are rare, so values are walked only where the line could hold one
    suspicious = b"\\u0000" in line or b"\\ud" in line or b"\\uD" in line
    return value, _reason(value, walk=suspicious)


def _reason(value: Any, walk: bool = True) -> str:
    if not isinstance(value, dict):
        return f"not an object but {_json_type(value)}"
    return _bad_text(value) if walk else ""


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _bad_text(value: Any) -> str:
    if isinstance(value, str):
        if "\0" in value:
            return "NUL character in the text"
        return "half of a surrogate pair in the text" if re.search("[\ud800-\udfff]", value) else ""
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_bad_text, inner)), "")


def _parquet(stream: BinaryIO | gzip.GzipFile, name: str) -> Numbered:
    import pyarrow
    import pyarrow.parquet as pq

    number = 0
    try:
        source = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
        for batch in pq.ParquetFile(source).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        raise UsageError(f"not a readable Parquet file after row {number}: {e}", where=name) from None


def _table(stream: BinaryIO | gzip.GzipFile, name: str, tabs: bool, named: tuple[str, ...], problems: Problems) -> Numbered:
    lines = _records(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""), tabs)
    header: list[str] | None = None
    for number, fields, reason in lines:
        if header is None and not reason:
            header, has_header = _header(fields, named, name)
            if has_header:
                continue
        reason = reason or _field_reason(fields, header or [])
        if reason:
            problems.add(f"{name} row {number}", reason)
        else:
            yield number, dict(zip(header or [], fields, strict=True))


def _records(text: io.TextIOWrapper, tabs: bool) -> Iterator[tuple[int, list[str], str]]:
    """Line number, fields, and why there are none. Tabs come without quoting, commas with."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(text, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield start, [], f"not comma-separated: {e} in line {reader.line_num}"
            continue
        if len(fields) > 1 or "".join(fields).strip():  # not a blank line
            yield start, [_unquote(f) for f in fields] if tabs else fields, ""


def _unquote(field: str) -> str:
    """Undo the quoting some writers put into tab-separated text: only where a doubled quote proves it."""
    inner = field[1:-1]
    proven = len(field) > 3 and field[0] == field[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if proven else field


def _field_reason(fields: list[str], header: list[str]) -> str:
    if any(re.search("[\udc80-\udcff]", f) for f in fields):
        return "invalid UTF-8"
    if any("\0" in f for f in fields):
        return "NUL character"
    return "" if len(fields) == len(header) else f"{len(fields)} columns instead of {len(header)}"


def _header(first: list[str], named: tuple[str, ...], name: str) -> tuple[list[str], bool]:
    """Column names and whether the first line gave them; a line of values gets names by its shape."""
    stripped = [f.strip() for f in first]
    known = HEADER_NAMES | set(named)
    if known & set(stripped) or all(re.fullmatch(r"[A-Za-z_][\w-]{0,40}", f) for f in stripped):
        repeated = {f for f in stripped if stripped.count(f) > 1}
        if repeated:
            raise UsageError(f"the header repeats {', '.join(sorted(repeated))}", where=name)
        return stripped, True
    labelled = bool(re.fullmatch(r"-?\d+", stripped[-1]))
    guess = {(1, False): ["text"], (2, True): ["text", "label"], (3, True): ["text", "pair", "label"]}
    if (len(first), labelled) in guess:
        return guess[len(first), labelled], False
    raise UsageError("the first line is no header, and the columns cannot be guessed", where=f"{name} row 1",
                     hint="Put a line with the column names on top, such as: text,label")  # fmt: skip
