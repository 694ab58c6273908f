"""F25–F29 in real runs: full disk, deleted folder, failing tracker, failing data; checkpoints stay."""

import errno
import shutil
from unittest import mock

import pytest
from runs import assert_same, at_event, bare, go, outcome, rows, settings, write_rows

from metier.core import files, log, sinks, state
from metier.core.data.loader import Loader
from metier.core.errors import MetierError, UsageError


@pytest.fixture
def text(tmp_path):
    return write_rows(tmp_path / "text.jsonl", rows())


def test_the_disk_is_full_when_saving(tmp_path, text):
    """F25."""
    run = settings(text, train__save_every=4)
    real = files.write

    def full(file, data):
        if "step-00000008" in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    with (
        mock.patch.object(files, "write", full),
        pytest.raises(MetierError, match=r"step 8 .*No space left.*MB free"),
    ):
        go(tmp_path / "run", run)
    found = state.find(tmp_path / "run" / "checkpoints")
    assert state.read(found).step == 4
    go(tmp_path / "run", run)
    go(tmp_path / "reference", run)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "reference"))


def test_the_disk_is_full_for_the_log_only(tmp_path, text):
    """F25: training is unaffected; the result has all events."""
    run = settings(text)
    real = files.write

    def full(file, data):
        if "step-" not in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    with mock.patch.object(files, "write", full):
        result = go(tmp_path / "run", run)
    reference = go(tmp_path / "reference", run)
    assert result.status == "done"
    assert [bare(e) for e in result.events if e["event"] == "step"] == [bare(e) for e in reference.events if e["event"] == "step"]
    assert len([e for e in result.events if e.get("level") == "warning"]) == 1


def test_the_folder_is_deleted_while_running(tmp_path, text):
    """F26: the next save makes it anew."""
    folder = tmp_path / "run"
    with at_event(lambda e: e["event"] == "step" and e["step"] == 5, lambda: shutil.rmtree(folder)):
        result = go(folder, settings(text))
    assert result.status == "done"
    assert state.read(state.find(folder / "checkpoints")).step == 12
    assert (folder / "model").is_dir()


@pytest.mark.parametrize("name", ["with space", "ünï-😀", "x" * 250, "a'b\"c$(d)"])
def test_odd_names_of_the_run_folder(tmp_path, text, name):
    """F26."""
    result = go(tmp_path / name, settings(text, train__steps=2))
    assert result.status == "done"
    assert go(tmp_path / name, settings(text, train__steps=2)).step == 2


def test_a_run_folder_that_cannot_be_one(tmp_path, text):
    with pytest.raises(UsageError, match="not a folder"):
        go(text, settings(text))
    with pytest.raises(UsageError, match="too long"):
        go(tmp_path / ("x" * 300), settings(text))


class Down:
    def __init__(self, folder) -> None: ...

    def log(self, event) -> None:
        raise ConnectionError("tracker down")

    def close(self) -> None:
        raise ConnectionError("tracker down")


def test_a_tracker_that_is_down_changes_nothing(tmp_path, text, monkeypatch):
    """F27."""
    monkeypatch.setitem(sinks.SINKS, "down", ("json", Down))
    go(tmp_path / "run", settings(text, sinks=["down"]))
    go(tmp_path / "reference", settings(text))
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "reference"))
    assert len([e for e in log.read(tmp_path / "run") if e.get("level") == "warning"]) == 1


def test_an_unknown_tracker_is_refused_before_anything(tmp_path, text):
    with pytest.raises(UsageError, match="tensorboard"):
        go(tmp_path / "run", settings(text, sinks=["tensorbord"]))
    assert not (tmp_path / "run").exists()


# --- F29 ----------------------------------------------------------------------------------------------------


def test_a_worker_that_fails(tmp_path, text):
    run = settings(text, train__workers=2, train__save_every=2)
    real = Loader._make_at

    def fail(self, position):
        if position == 20:
            raise MemoryError("worker died")
        return real(self, position)

    with (
        mock.patch.object(Loader, "_make_at", fail),
        pytest.raises((MemoryError, MetierError), match="worker died"),
    ):
        go(tmp_path / "run", run)
    assert state.read(state.find(tmp_path / "run" / "checkpoints")).step == 4
    go(tmp_path / "run", run)
    go(tmp_path / "reference", run)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "reference"))


def stream(text, tmp_path, **changes):
    other = write_rows(tmp_path / "other.jsonl", rows(count=9, seed=5))
    return settings(
        text,
        data__train={"a": str(text), "b": str(other)},
        data__source={"mix": {"weights": {"a": 1.0, "b": 1.0}}},
        **changes,
    )


def test_a_source_that_fails_at_item_17(tmp_path, text):
    run = stream(text, tmp_path, train__save_every=1)
    go(tmp_path / "reference", run)
    from metier.parts.source.mix import Mix

    real = Mix.stream

    def fail(self, *args, **kwargs):
        for i, item in enumerate(real(self, *args, **kwargs)):
            if i == 16:
                raise ValueError("disk on fire")
            yield item

    with (
        mock.patch.object(Mix, "stream", fail),
        pytest.raises(MetierError, match="example 17 of epoch 1: ValueError: disk on fire"),
    ):
        go(tmp_path / "run", run)
    assert state.read(state.find(tmp_path / "run" / "checkpoints")).step == 4
    go(tmp_path / "run", run)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "reference"))


def test_data_shorter_than_the_run_end_cleanly(tmp_path, text):
    run = settings(text)

    with mock.patch.object(Loader, "stop_at", 10, create=True):
        real = Loader.__init__

        def short(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self.stop_at = 10

        with mock.patch.object(Loader, "__init__", short):
            result = go(tmp_path / "run", run)
    assert result.status == "ended"
    assert result.step == 3
    assert any("the data have ended" in e.get("text", "") for e in result.events)
    assert state.read(state.find(tmp_path / "run" / "checkpoints")).step == 3
    assert (tmp_path / "run" / "model").is_dir()
