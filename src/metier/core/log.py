"""The run's log: ``metrics.jsonl``, one event per line, copied to the console and to trackers.

Every line is valid JSON. Numbers that are not finite stand as ``null``; those at the top level are also named
under ``"nonfinite"`` (``{"loss": null, "nonfinite": {"loss": "nan"}}``), so that :func:`read` gives back the
float. No failure to log stops a run: the first one is said, and events that could not be written are kept in
memory and tried again.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

from metier.core import files
from metier.core import sinks as trackers

NAME = "metrics.jsonl"
EVENTS = ("step", "eval", "checkpoint", "notice", "guard")


def read(folder: Path) -> list[dict[str, Any]]:
    """The events of a run folder in order; ``[]`` when there are none. Lines torn by a crash are left out."""
    return [event for _, event in _lines(Path(folder) / NAME)]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in raw.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                found.append((line, _restored(event)))
    return found


def _restored(event: dict[str, Any]) -> dict[str, Any]:
    odd = event.pop("nonfinite", None)
    if isinstance(odd, dict):
        event.update({name: float(text) for name, text in odd.items()})
    return event


def _encoded(event: dict[str, Any]) -> bytes:
    odd = {k: str(v) for k, v in event.items() if isinstance(v, float) and not math.isfinite(v)}
    plain = _plain(event)
    if odd:
        plain["nonfinite"] = odd
    return (json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """As JSON has it: tensors and NumPy values as numbers or lists, anything foreign as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


class RunLog:
    """The log of one run; a context manager.

    ``sinks`` are names from ``core/sinks.py``; ``console`` has ``event(dict)`` and ``set_total(int)``. With
    ``write=False`` (all processes but the first) nothing is written or sent, and ``events`` gives what was
    emitted here.

    Raises ``UsageError`` for a sink that is unknown or not installed.
    """

    def __init__(self, folder: Path, sinks: Iterable[str] = (), console: Any = None, write: bool = True) -> None:
        self.folder, self.console, self.write = Path(folder), console, write
        self.path = self.folder / NAME
        self._names = tuple(sinks)
        trackers.check(self._names)
        self._sinks: dict[str, trackers.Sink] = {}
        self._file: FileIO | None = None
        self._unwritten: list[dict[str, Any]] = []
        self._last: dict[str, int] = {}
        self._warned: set[str] = set()

    def __enter__(self) -> "RunLog":
        if self.write:
            for event in read(self.folder):
                self._remember(event)
            for name in self._names:
                self._guarded(name, lambda name=name: self._sinks.update({name: trackers.open_sink(name, self.folder)}))
        return self

    def __exit__(self, *_: object) -> None:
        for name, sink in list(self._sinks.items()):
            self._guarded(name, sink.close)
        self._sinks.clear()
        self._close()

    def start(self, step: int, steps: int | None = None) -> None:
        """Training starts after ``step``: forget what an earlier start logged beyond it.

        What belongs to later steps will be logged again, so the log becomes that of a run that was never
        interrupted, apart from notices (all are kept) and the checkpoint of the interruption. ``steps`` tells
        the console the length of the run.
        """
        if self.console is not None and steps is not None:
            self.console.set_total(steps)
        if not self.write:
            return
        self._flush()
        kept = [(line, event) for line, event in _lines(self.path) if _stays(event, step)]
        self._last.clear()
        for event in [*(event for _, event in kept), *self._unwritten]:
            self._remember(event)
        self._try(lambda: self._rewrite([line for line, _ in kept]))

    def emit(self, event: dict[str, Any]) -> None:
        """Log an event (``{"event": one of EVENTS, …}``); adds ``time`` (Unix)."""
        event = {**event, "time": event.get("time", time.time())}
        self._remember(event)
        self._unwritten.append(event)
        if self.write:
            self._flush()
        for name, sink in list(self._sinks.items()):
            self._guarded(name, lambda sink=sink: sink.log(event))
        if self.console is not None:
            self.console.event(event)

    def events(self) -> list[dict[str, Any]]:
        """All events of the run, earlier starts included, in order."""
        return [*(read(self.folder) if self.write else []), *self._unwritten]

    def last_step(self, event_name: str) -> int | None:
        """The step of the last event of this kind, or ``None``."""
        return self._last.get(event_name)

    # --- the file -------------------------------------------------------------------------------------------

    def _remember(self, event: dict[str, Any]) -> None:
        if isinstance(event.get("step"), int):
            self._last[event["event"]] = event["step"]

    def _flush(self) -> None:
        """Write what is not written yet; on failure it stays in memory, and the last line is whole."""
        if self._unwritten:
            self._try(self._append)

    def _append(self) -> None:
        file = self._opened()
        if os.fstat(file.fileno()).st_nlink == 0:
            self._close()
            raise OSError("the file was deleted while the run was going on")
        while self._unwritten:
            end = os.fstat(file.fileno()).st_size
            try:
                files.write(file, _encoded(self._unwritten[0]))
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
            del self._unwritten[0]

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666), "a")
            size = os.fstat(self._file.fileno()).st_size
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                files.write(self._file, b"\n")
        return self._file

    def _rewrite(self, lines: list[bytes]) -> None:
        content = b"".join(line + b"\n" for line in lines)
        if not self.path.exists() or self.path.read_bytes() == content:
            return
        self._close()
        aside = self.path.with_name(f".{NAME}.tmp")
        aside.unlink(missing_ok=True)
        files.write_new(aside, content)
        files.replace(aside, self.path)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- failures -------------------------------------------------------------------------------------------

    def _try(self, action: Any) -> None:
        try:
            action()
        except OSError as e:
            self._warn(
                NAME,
                f"{self.path} cannot be written ({e.strerror or e}); events stay in memory, training goes on",
            )

    def _guarded(self, name: str, action: Any) -> None:
        """A tracker may raise anything; it gets no further events."""
        try:
            action()
        except Exception as e:
            self._sinks.pop(name, None)
            self._warn(
                name,
                f"the sink {name} failed ({type(e).__name__}: {e}) and gets no more events; training goes on",
            )

    def _warn(self, about: str, text: str) -> None:
        if about in self._warned:
            return
        self._warned.add(about)
        event = {"event": "notice", "level": "warning", "text": text}
        if self.console is None:
            with contextlib.suppress(OSError, ValueError):
                print(f"metier: {text}", file=sys.stderr)
        self.emit(event)


def _stays(event: dict[str, Any], step: int) -> bool:
    """Whether an event from before belongs to a run that now continues after ``step``."""
    if event["event"] == "notice":
        return True
    number = event.get("step")
    if not isinstance(number, int) or step == 0:
        return False
    # A skipped update is reported with the number of steps before it, so it belongs to the next one.
    return number + (event.get("kind") == "nonfinite") <= step
