"""The log: lossless lines, exact continuation, and no failure that stops a run."""

import errno
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from metier.core import files, log, sinks
from metier.core.errors import UsageError
from metier.core.log import RunLog, read


class Screen:
    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.total = None

    def event(self, event) -> None:
        self.seen.append(event)

    def set_total(self, steps) -> None:
        self.total = steps


def step(n: int, **more) -> dict:
    return {"event": "step", "step": n, "loss": 1.0 / n, "time": 100.0 + n, **more}


def bare(events) -> list[dict]:
    return [{k: v for k, v in e.items() if k != "time"} for e in events]


def test_events_are_lines_at_once_and_time_is_added(tmp_path):
    with RunLog(tmp_path) as journal:
        journal.emit({"event": "notice", "text": "é\n\u2028"})
        journal.start(0)
        journal.emit(step(1))
        on_disk = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        assert len(on_disk) == 3
        assert on_disk[2] == ""
        first = json.loads(on_disk[0])
        assert first["text"] == "é\n\u2028"
        assert abs(first["time"] - __import__("time").time()) < 60
        assert json.loads(on_disk[1])["time"] == 101.0
        assert journal.events() == read(tmp_path)
        assert journal.last_step("step") == 1
        assert journal.last_step("eval") is None


def test_floats_that_are_not_finite_survive_valid_json(tmp_path):
    event = {
        "event": "guard",
        "step": 3,
        "loss": math.nan,
        "grad_norm": math.inf,
        "low": -math.inf,
        "in": {"x": [math.nan, 1]},
    }
    with RunLog(tmp_path) as journal:
        journal.emit(event)
    text = (tmp_path / "metrics.jsonl").read_text()
    raw = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert raw["loss"] is None
    assert raw["grad_norm"] is None
    (back,) = read(tmp_path)
    assert math.isnan(back["loss"])
    assert (back["grad_norm"], back["low"]) == (math.inf, -math.inf)
    assert back["in"] == {"x": [None, 1]}
    assert "nonfinite" not in back


def test_foreign_values_become_plain(tmp_path):
    with RunLog(tmp_path) as journal:
        journal.emit({
            "event": "step", "step": 1, "a": torch.tensor(0.5), "b": np.float32(0.25), "c": np.arange(2),
            "d": Path("x"), "e": torch.tensor([1, 2]), "f": (1, 2), 3: "key", "g": np.float64("nan"),
        })  # fmt: skip
    (back,) = read(tmp_path)
    assert (back["a"], back["b"], back["c"], back["d"], back["e"], back["f"], back["3"]) == (
        0.5,
        0.25,
        [0, 1],
        "x",
        [1, 2],
        [1, 2],
        "key",
    )
    assert math.isnan(back["g"])


def test_the_callers_event_is_not_changed(tmp_path):
    event = {"event": "step", "step": 1}
    with RunLog(tmp_path) as journal:
        journal.emit(event)
    assert event == {"event": "step", "step": 1}


# --- continuing ---------------------------------------------------------------------------------------------


def run(folder, first: int, last: int, *, save: int = 5, crash_at: int | None = None) -> None:
    """What the loop logs for steps ``first + 1`` … ``last``, saving and evaluating every ``save``."""
    with RunLog(folder) as journal:
        journal.start(first)
        for n in range(first + 1, last + 1):
            if n == 8:
                journal.emit(
                    {
                        "event": "guard",
                        "kind": "nonfinite",
                        "step": n - 1,
                        "action": "skip",
                        "text": "nan",
                        "time": 0.0,
                    }
                )
            journal.emit(step(n))
            if n % save == 0:
                journal.emit({"event": "eval", "step": n, "eval_loss": n, "time": 0.0})
                journal.emit({"event": "checkpoint", "step": n, "name": f"step-{n:08d}", "time": 0.0})
            if n == crash_at:
                return


@pytest.mark.parametrize("crash", range(1, 20))
@pytest.mark.parametrize("torn", [b"", b'{"event": "step", "st', b"\xff\xfe", b"\n\n"])
def test_a_resumed_log_equals_the_uninterrupted_one(tmp_path, crash, torn):
    run(tmp_path / "reference", 0, 20) if (tmp_path / "reference").mkdir() is None else None
    (tmp_path / "run").mkdir()
    run(tmp_path / "run", 0, 20, crash_at=crash)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as f:
        f.write(torn)
    run(tmp_path / "run", crash // 5 * 5, 20)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "reference" / "metrics.jsonl").read_bytes()


def test_notices_stay_and_those_before_start_too(tmp_path):
    with RunLog(tmp_path) as journal:
        journal.start(0)
        journal.emit({"event": "notice", "text": "first"})
        for n in (1, 2, 3):
            journal.emit(step(n))
        journal.emit({"event": "notice", "step": 3, "text": "late"})
    with RunLog(tmp_path) as journal:
        assert journal.last_step("step") == 3
        journal.emit({"event": "notice", "text": "assembling"})
        journal.start(1)
        assert journal.last_step("step") == 1
        journal.emit(step(2))
    texts = [e.get("text", e.get("step")) for e in read(tmp_path)]
    assert texts == ["first", 1, "late", "assembling", 2]


def test_without_a_checkpoint_everything_but_notices_goes(tmp_path):
    run(tmp_path, 0, 4)
    with RunLog(tmp_path) as journal:
        journal.emit({"event": "notice", "text": "again"})
        journal.start(0)
        assert journal.last_step("step") is None
    assert [e["event"] for e in read(tmp_path)] == ["notice"]


def test_an_untouched_log_is_not_rewritten(tmp_path):
    run(tmp_path, 0, 5)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    run(tmp_path, 5, 6)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_reading_is_tolerant(tmp_path):
    assert read(tmp_path / "missing") == []
    lines = [
        b'{"event": "step", "step": 1}',
        b"{torn",
        b"\xff",
        b"[1]",
        b'"x"',
        b'{"no": 1}',
        b"[" * 100_000,
        b'{"event":"eval"}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [e["event"] for e in read(tmp_path)] == ["step", "eval"]


def test_the_console_sees_everything_and_the_total(tmp_path):
    screen = Screen()
    with RunLog(tmp_path, console=screen) as journal:
        journal.emit({"event": "notice", "text": "a"})
        journal.start(0, 30)
        journal.emit(step(1))
    assert screen.total == 30
    assert [e["event"] for e in screen.seen] == ["notice", "step"]


def test_other_processes_write_nothing(tmp_path):
    with RunLog(tmp_path / "nowhere", sinks=(), write=False) as journal:
        journal.emit({"event": "notice", "text": "a"})
        journal.start(3)
        journal.emit(step(4, loss=math.nan))
        assert [e["event"] for e in journal.events()] == ["notice", "step"]
        assert math.isnan(journal.events()[1]["loss"])
        assert journal.last_step("step") == 4
    assert not (tmp_path / "nowhere").exists()


# --- failures -----------------------------------------------------------------------------------------------


def test_a_full_disk_warns_once_and_the_log_catches_up(tmp_path, monkeypatch):
    """F25: events are kept, no line is torn, and they are written when there is room again."""
    screen = Screen()
    real = files.write
    with RunLog(tmp_path, console=screen) as journal:
        journal.start(0)
        journal.emit(step(1))

        def full(file, data):
            real(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files, "write", full)
        for n in (2, 3, 4):
            journal.emit(step(n))
        assert [e["step"] for e in journal.events() if e["event"] == "step"] == [1, 2, 3, 4]
        assert [e["step"] for e in read(tmp_path)] == [1]
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
        monkeypatch.setattr(files, "write", real)
        journal.emit(step(5))
    warnings = [e for e in screen.seen if e.get("level") == "warning"]
    assert len(warnings) == 1
    assert "No space left" in warnings[0]["text"]
    assert [e["step"] for e in read(tmp_path) if e["event"] == "step"] == [1, 2, 3, 4, 5]


def test_a_rewrite_on_a_full_disk_keeps_the_old_log(tmp_path, monkeypatch):
    run(tmp_path, 0, 9)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunLog(tmp_path) as journal:
        monkeypatch.setattr(files, "write", full)
        journal.start(5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_deleted_folder_warns_once(tmp_path, capsys):
    """F26."""
    import shutil

    folder = tmp_path / "run"
    folder.mkdir()
    with RunLog(folder) as journal:
        journal.emit(step(1))
        shutil.rmtree(folder)
        for n in (2, 3):
            journal.emit(step(n))
        assert [e["step"] for e in journal.events() if e["event"] == "step"] == [2, 3]
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_the_clock_may_jump_back(tmp_path, monkeypatch):
    """F26: order is the order of the lines."""
    times = iter([1e9, 5.0, -3.0, 0.0])
    monkeypatch.setattr(log.time, "time", lambda: next(times))
    with RunLog(tmp_path) as journal:
        journal.start(0)
        for n in (1, 2, 3):
            journal.emit({"event": "step", "step": n})
    assert [(e["step"], e["time"]) for e in read(tmp_path)] == [(1, 1e9), (2, 5.0), (3, -3.0)]


@pytest.mark.parametrize("name", ["with space", "ünï-😀", "x" * 250, "-dash", "a'b\"c"])
def test_odd_folder_names(tmp_path, name):
    """F26."""
    folder = tmp_path / name
    folder.mkdir()
    run(folder, 0, 6)
    assert len(read(folder)) == 8


# --- trackers -----------------------------------------------------------------------------------------------


class Tracker:
    def __init__(self, fail_at: int | None = None, start=None, close=None) -> None:
        self.events, self.fail_at, self.closed, self.error = [], fail_at, False, close
        if start:
            raise start

    def log(self, event) -> None:
        if self.fail_at is not None and len(self.events) >= self.fail_at:
            raise ConnectionError("tracker down")
        self.events.append(event)

    def close(self) -> None:
        self.closed = True
        if self.error:
            raise self.error


def install(monkeypatch, make) -> list:
    made: list = []
    monkeypatch.setitem(sinks.SINKS, "fake", ("json", lambda folder: made.append(make()) or made[-1]))
    return made


def test_a_sink_gets_every_event_and_is_closed(tmp_path, monkeypatch):
    made = install(monkeypatch, Tracker)
    with RunLog(tmp_path, sinks=["fake"]) as journal:
        journal.emit(step(1))
        journal.emit({"event": "notice", "text": "x"})
    assert [e["event"] for e in made[0].events] == ["step", "notice"]
    assert made[0].closed


@pytest.mark.parametrize("make", [
    lambda: Tracker(fail_at=1),
    lambda: Tracker(start=OSError("no network")),
    lambda: Tracker(close=ValueError("late")),
])  # fmt: skip
def test_a_failing_sink_warns_once_and_nothing_else_changes(tmp_path, monkeypatch, make):
    """F27."""
    install(monkeypatch, make)
    screen = Screen()
    with RunLog(tmp_path, sinks=["fake"], console=screen) as journal:
        for n in (1, 2, 3):
            journal.emit(step(n))
    assert [e["step"] for e in read(tmp_path) if e["event"] == "step"] == [1, 2, 3]
    warnings = [e for e in read(tmp_path) if e.get("level") == "warning"]
    assert len(warnings) == 1
    assert "the sink fake failed" in warnings[0]["text"]
    assert [e for e in screen.seen if e.get("level") == "warning"] == warnings


def test_unknown_and_missing_sinks_are_usage_errors(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"unknown sink 'tensorbord'(.|\n)*Did you mean 'tensorboard'"):
        RunLog(tmp_path, sinks=["tensorbord"])
    monkeypatch.setitem(sinks.SINKS, "fake", ("surely_not_installed", Tracker))
    with pytest.raises(UsageError, match="pip install surely_not_installed"):
        RunLog(tmp_path, sinks=["fake"], write=False)


def test_scalars_for_trackers():
    event = {
        "event": "eval",
        "step": 3,
        "time": 1.0,
        "eval_loss": 2,
        "name": "x",
        "flag": True,
        "eval_acc": 0.5,
        "list": [1],
    }
    assert sinks.scalars(event) == {"eval/loss": 2.0, "eval/acc": 0.5}
    assert sinks.scalars({"event": "step", "step": 3, "loss": 1.5}) == {"train/loss": 1.5}
    assert sinks.scalars({"event": "notice", "step": 3, "x": 1}) == {}


def recorder(name, calls):
    module = types.ModuleType(name)
    logged = lambda values, step=None: calls.append((values, step))
    module.log = logged
    module.finish = lambda: calls.append("finish")
    module.init = lambda **settings: calls.append(settings) or module
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_called_as_they_document(tmp_path, monkeypatch, name):
    calls: list = []
    monkeypatch.setitem(sys.modules, name, recorder(name, calls))
    sink = sinks.open_sink(name, tmp_path / "my-run")
    sink.log(step(1))
    sink.log({"event": "notice", "text": "x"})
    sink.close()
    assert calls[0]["project"] == "metier"
    assert calls[0]["name"] == "my-run"
    assert calls[1:] == [({"train/loss": 1.0}, 1), "finish"]


def test_tensorboard(tmp_path, monkeypatch):
    calls: list = []

    class SummaryWriter:
        def __init__(self, where) -> None:
            calls.append(where)

        def add_scalar(self, *args, walltime) -> None:
            calls.append((*args, walltime))

        def close(self) -> None:
            calls.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    sink = sinks.open_sink("tensorboard", tmp_path)
    sink.log(step(1))
    sink.close()
    assert calls == [str(tmp_path / "tensorboard"), ("train/loss", 1.0, 1, 101.0), "close"]
