"""What the run fault tests share: tiny runs, ways to stop one at an exact point, what must come out equal."""

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from metier.core import log
from metier.core.api import Result, train
from metier.core.batch import Labels, Lists, Pairs, Rated, Rewards, Tokens

VOLATILE = ("time", "seconds", "elapsed", "tokens_per_second", "memory")


class Crash(Exception):
    """Stands for any defect in the middle of a run."""


def _words(rng: random.Random, low: int = 3, high: int = 9) -> str:
    return " ".join(rng.choices(("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"), k=rng.randint(low, high)))


def rows(reads: type = Tokens, count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the format that an objective reading ``reads`` takes."""
    rng = random.Random(seed)

    def row(i: int) -> dict[str, Any]:
        text = f"{i} {_words(rng)}"
        if reads in (Pairs, Rewards):
            return {"prompt": text, "chosen": _words(rng), "rejected": _words(rng)}
        if reads is Rated:
            return {"prompt": text, "completion": _words(rng), "label": i % 3 > 0}
        if reads is Lists:
            return {"prompt": text, "completions": [_words(rng) for _ in range(3)], "scores": [3.0, 2.0, 1.0]}
        if reads is Labels:
            return {"text": text, "label": i % 3}
        return {"text": text}

    return [row(i) for i in range(count)]


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(r) + "\n" for r in made), encoding="utf-8")
    return path


def settings(data: Path, **changes: Any) -> dict[str, Any]:
    """A run file as a mapping; ``changes`` by dotted key with ``__`` for the dot."""
    run: dict[str, Any] = {
        "model": "lab/llama-50k",
        "data": {"train": str(data), "max_length": 64},
        "optimizer": {"adamw": {"lr": 1e-2}},
        "train": {"steps": 12, "batch": 4, "seed": 3},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = run
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return run


@contextlib.contextmanager
def at_event(matches: Callable[[dict[str, Any]], bool], action: Callable[[], Any]) -> Iterator[None]:
    """Do ``action`` right after the first event that matches was logged."""
    real, done = log.RunLog.emit, []

    def emit(self: log.RunLog, event: dict[str, Any]) -> None:
        real(self, event)
        if not done and matches(event):
            done.append(True)
            action()

    with mock.patch.object(log.RunLog, "emit", emit):
        yield


def go(folder: Path, run: dict[str, Any], **options: Any) -> Result:
    """Train to the end."""
    return train(run, out=folder, quiet=True, **options)


def stop_after(step: int, folder: Path, run: dict[str, Any]) -> Result:
    """Send this process a real SIGTERM when ``step`` was logged (0: before the first step)."""
    send = lambda: os.kill(os.getpid(), signal.SIGTERM)
    if step == 0:
        real = log.RunLog.start

        def start(self: log.RunLog, *args: Any) -> None:
            real(self, *args)
            send()

        with mock.patch.object(log.RunLog, "start", start):
            return go(folder, run)
    with at_event(lambda e: e["event"] == "step" and e["step"] == step, send):
        return go(folder, run)


def crash_after(step: int, folder: Path, run: dict[str, Any]) -> None:
    """An exception when ``step`` was logged; no checkpoint is written for it."""

    def crash() -> None:
        raise Crash

    with at_event(lambda e: e["event"] == "step" and e["step"] == step, crash), contextlib.suppress(Crash):
        go(folder, run)
        raise AssertionError("the run did not crash")


def bare(event: dict[str, Any]) -> dict[str, Any]:
    """An event without what differs between two equal runs."""
    return {k: v for k, v in event.items() if k not in VOLATILE}


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal, bit for bit: newest checkpoint, result and metrics."""
    newest = max((folder / "checkpoints").iterdir())
    found: dict[str, Any] = {}
    for kept in (newest, folder / "model", folder / "adapter"):
        found |= {str(p.relative_to(folder)): p.read_bytes() for p in sorted(kept.rglob("*")) if p.is_file()}
    found["events"] = [bare(e) for e in log.read(folder) if e["event"] in ("step", "eval", "guard")]
    return found


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Names what differs instead of printing bytes."""
    assert got["events"] == expected["events"]
    assert got.keys() == expected.keys()
    assert [k for k in got if got[k] != expected[k]] == []
