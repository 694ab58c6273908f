import fcntl
import json
import os
import socket
import stat
import subprocess
import sys

import pytest

from metier.core import lock
from metier.core.errors import UsageError


def test_the_folder_is_made_held_and_released(tmp_path):
    folder = tmp_path / "a" / "b"
    with lock.run_folder(folder) as notice:
        assert notice is None
        assert json.loads((folder / "lock").read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
        (folder / "kept").touch()
    assert [p.name for p in folder.iterdir()] == ["kept"]
    with lock.run_folder(folder) as notice:
        assert notice is None


def test_an_unused_new_folder_goes_away_and_an_old_one_stays(tmp_path):
    with lock.run_folder(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with lock.run_folder(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), lock.run_folder(tmp_path / "run"):
        raise RuntimeError
    with lock.run_folder(tmp_path / "run"):
        pass


def test_nested_in_one_process_is_refused_and_the_first_still_holds(tmp_path):
    with lock.run_folder(tmp_path):
        for _ in range(2):
            with pytest.raises(UsageError, match="in use by this process"), lock.run_folder(tmp_path):
                pass
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_another_host_is_named(tmp_path):
    with (tmp_path / "lock").open("w") as f:
        json.dump({"pid": 5, "host": "elsewhere"}, f)
        f.flush()
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="process 5 on elsewhere"), lock.run_folder(tmp_path):
            pass


@pytest.mark.parametrize("left", ["", "garbage", "[1]", "\x00\xff"])
def test_an_unreadable_lock_that_nobody_holds_is_no_obstacle(tmp_path, left):
    (tmp_path / "lock").write_text(left)
    with lock.run_folder(tmp_path) as notice:
        assert (notice is None) == (left == "")


def test_a_lock_that_was_replaced_while_waiting_is_not_trusted(tmp_path, monkeypatch):
    """The holder removes its file on leaving; whoever had it open must not believe to hold the folder."""
    path = tmp_path / "lock"
    real, moves = fcntl.flock, []

    def flock(fd, how):
        if not moves:
            moves.append(path.unlink())
        return real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.run_folder(tmp_path):
        assert path.exists()
        monkeypatch.undo()
        with pytest.raises(UsageError), lock.run_folder(tmp_path):
            pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(victim)
    with pytest.raises(UsageError), lock.run_folder(tmp_path / "run"):
        pass
    assert victim.read_text() == "precious"


def test_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="not a folder"), lock.run_folder(path):
            pass


def test_too_long_a_name(tmp_path):
    with (
        pytest.raises(UsageError, match="the name is too long") as e,
        lock.run_folder(tmp_path / ("x" * 300)),
    ):
        pass
    assert len(str(e.value)) < 300


def test_a_folder_without_write_permission(tmp_path):
    code = (
        "import os, sys\n"
        "from metier.core import lock\n"
        "if os.getuid() == 0: os.seteuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        with lock.run_folder(path): pass\n"
        "    except lock.UsageError as e: print(e)\n"
    )
    folder = tmp_path / "closed"
    folder.mkdir()
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    folder.chmod(0o555)
    paths = [str(folder), str(folder / "new")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("cannot be the run folder: permission denied") == 2, done.stderr
    assert done.stdout.count("out=") == 2
    folder.chmod(0o755)


def test_read_only_file_system(tmp_path, monkeypatch):
    import errno

    def refuse(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UsageError, match="read-only"), lock.run_folder(tmp_path):
        pass
