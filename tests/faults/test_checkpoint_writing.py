"""F4, F15, F25: whatever fails while a checkpoint is written or removed, a complete one is found then."""

import contextlib
import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import Faulty, assert_is, save

from metier.core import files, state
from metier.core.errors import MetierError


def operations(tmp_path, monkeypatch, action) -> list:
    with monkeypatch.context() as m:
        counter = Faulty(m)
        action()
    return counter.log


@pytest.mark.parametrize("after", [False, True], ids=["one fails", "dead from there"])
def test_every_operation_of_a_save_may_fail(tmp_path, monkeypatch, after):
    save(tmp_path / "count", 1)
    log = operations(tmp_path, monkeypatch, lambda: save(tmp_path / "count", 2))
    rename = next(i for i, (name, _) in enumerate(log, 1) if name == "replace")
    assert len(log) > 15
    for n in range(1, len(log) + 1):
        root = tmp_path / f"{n}"
        save(root, 1)
        with monkeypatch.context() as m:
            Faulty(m, n, after=after)
            with pytest.raises(MetierError, match="step 2 could not be written"):
                save(root, 2)
        # After the rename the new one is complete, only its durability is unknown.
        assert_is(state.find(root), 2 if n > rename else 1)
        assert_is(root / "step-00000001", 1)
        assert_is(save(root, 3), 3)
        assert_is(state.find(root), 3)
        assert not list(root.glob(".*")), "the next save removes what the failed one left"


@pytest.mark.parametrize("after", [False, True], ids=["one fails", "dead from there"])
def test_every_operation_of_saving_a_step_again_may_fail(tmp_path, monkeypatch, after):
    """A run that resumes at a step and stops there saves it again: at no moment may the step be lost."""
    save(tmp_path / "count", 2)
    log = operations(tmp_path, monkeypatch, lambda: save(tmp_path / "count", 2))
    for n in range(1, len(log) + 1):
        root = tmp_path / f"{n}"
        save(root, 1)
        save(root, 2)
        with monkeypatch.context() as m:
            Faulty(m, n, after=after)
            with contextlib.suppress(MetierError):
                save(root, 2)
        assert_is(state.find(root), 2)
        save(root, 2)
        assert_is(root / "step-00000002", 2)
        assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_order_of_a_save_is_content_then_manifest_then_rename(tmp_path, monkeypatch):
    log = operations(tmp_path, monkeypatch, lambda: save(tmp_path / "run", 2))
    names = [name for name, _ in log]
    created = [args[0].name for name, args in log if name == "create"]
    assert created[-1] == "MANIFEST.json"
    assert names.count("fsync") == len(created), "every file is synchronised"
    commit = names.index("replace")
    assert names[commit - 1] == "fsync_folder", "entries first, then the rename"
    assert names[commit + 1] == "fsync_folder", "then the parent"
    assert log[commit + 1][1][0] == tmp_path / "run"
    assert max(i for i, n in enumerate(names) if n == "fsync") < commit


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_of_a_save_leaves_nothing(tmp_path, monkeypatch, stop):
    save(tmp_path, 1)

    def interrupted(file):
        raise stop

    with monkeypatch.context() as m:
        m.setattr(files, "fsync", interrupted)
        with pytest.raises(stop):
            save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_what_dead_writers_left_makes_room_first(tmp_path, monkeypatch):
    left = tmp_path / ".step-00000001.tmp-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / ".step-00000001.tmp-keep").mkdir()
    rooms = []
    real = files.create
    monkeypatch.setattr(files, "create", lambda path: rooms.append(left.exists()) or real(path))
    save(tmp_path, 2)
    assert not any(rooms)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step-00000001.tmp-keep", "step-00000002"]


def test_a_full_disk_is_said_with_the_free_space(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as m:
        Faulty(m, 4, code=errno.ENOSPC)
        with pytest.raises(MetierError, match=r"MB free.*\n.*Earlier checkpoints are as before"):
            save(tmp_path, 2)
    assert_is(state.find(tmp_path), 1)


LIMITED = """
import resource, sys, torch
sys.path.insert(0, {here!r})
from checkpoints import save
from metier.core import state
from metier.core.errors import MetierError
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    state.write({root!r}, 2, tensors={{"model": {{"w": torch.zeros(100_000)}}}}, meta={{}}, finite=True)
except MetierError as e:
    print(e)
    sys.exit(e.exit_code)
"""


def test_a_real_limit_on_file_size(tmp_path):
    save(tmp_path, 1)
    code = LIMITED.format(here=str(Path(__file__).parent), root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert_is(state.find(tmp_path), 1)


@pytest.mark.parametrize("moment", range(6))
def test_sigkill_while_saving(tmp_path, moment):
    """A real process killed in the middle of saves of 4 MB each."""
    code = (
        "import sys, torch, itertools\n"
        "from metier.core import state\n"
        "t = {'model': {str(i): torch.full((1 << 16,), 1.0 * i) for i in range(16)}}\n"
        "for step in itertools.count(1):\n"
        f"    state.write({str(tmp_path)!r}, step, tensors=t, meta={{}}, finite=True)\n"
        f"    state.rotate({str(tmp_path)!r}, 2)\n"
        "    print(step, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = [int(child.stdout.readline()) for _ in range(2)]
    try:
        child.wait(timeout=0.004 * (moment + 1))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    said += [int(line) for line in child.stdout]
    child.wait()
    found = state.find(tmp_path)
    assert found is not None
    loaded = state.read(found)
    assert loaded.step in (said[-1], said[-1] + 1)
    assert all(bool((t == float(name)).all()) for name, t in loaded.tensors["model"].items())
    save(tmp_path, loaded.step + 5)
    assert not list(tmp_path.glob(".*"))


# --- rotation -----------------------------------------------------------------------------------------------


def names(root) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in root.glob("step-*"))


def test_rotation_keeps_the_newest_and_the_newest_healthy(tmp_path):
    """F15: a run that diverges slowly and saves every step never loses its last healthy checkpoint."""
    for step in range(1, 10):
        save(tmp_path, step, finite=step <= 3)
        state.rotate(tmp_path, 2)
        healthy = min(step, 3)
        assert names(tmp_path) == sorted({healthy, max(1, step - 1), step}), step
    assert_is(tmp_path / "step-00000003", 3)


def test_a_damaged_checkpoint_does_not_count_as_kept_or_as_healthy(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (4, 5):
        save(tmp_path, step, finite=False)
    target = tmp_path / "step-00000003" / "model.safetensors"
    raw = bytearray(target.read_bytes())
    raw[-1] ^= 1
    target.write_bytes(raw)
    state.rotate(tmp_path, 1)
    assert names(tmp_path) == [2, 5], "3 says it is healthy but is damaged, so 2 is the newest healthy one"


def test_nothing_is_removed_when_the_new_checkpoint_does_not_verify(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "optim.safetensors").unlink()
    assert state.rotate(tmp_path, 2) == []
    assert names(tmp_path) == [1, 2, 3]
    assert [p.name for p in state.rotate(tmp_path, 1)] == ["step-00000001"]


def test_every_operation_of_a_rotation_may_fail(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        save(tmp_path / "count", step)
    log = operations(tmp_path, monkeypatch, lambda: state.rotate(tmp_path / "count", 2))
    assert log[0][0] == "unlink"
    assert log[0][1][0].name == "MANIFEST.json", "a half removed folder is no checkpoint"
    for n in range(1, len(log) + 1):
        root = tmp_path / f"{n}"
        for step in (1, 2, 3, 4):
            save(root, step)
        with monkeypatch.context() as m:
            Faulty(m, n, after=True)
            state.rotate(root, 2)
        for step in (3, 4):
            assert_is(root / f"step-{step:08d}", step)
        assert_is(state.find(root), 4)
        state.rotate(root, 2)
        assert names(root) == [3, 4]


def test_rotation_leaves_links_and_strangers_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere, 1)
    root = tmp_path / "root"
    for step in (2, 3):
        save(root, step)
    (root / "step-00000001").symlink_to(elsewhere / "step-00000001")
    (root / "notes").mkdir()
    (root / "step-best").mkdir()
    state.rotate(root, 1)
    assert_is(elsewhere / "step-00000001", 1)
    assert {p.name for p in root.iterdir()} == {"step-00000001", "step-00000003", "notes", "step-best"}
