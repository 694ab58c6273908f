"""F24: two processes cannot write one run folder; the lock of a dead one is taken over, and said."""

import json
import signal
import subprocess
import sys

import pytest

from metier.core import lock
from metier.core.errors import UsageError

HOLD = """
import sys, time
from metier.core import lock
with lock.run_folder(sys.argv[1]) as notice:
    print(notice, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "None\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_second_process_is_refused_with_the_pid(tmp_path, holder):
    with pytest.raises(UsageError, match=f"in use by process {holder.pid}") as e, lock.run_folder(tmp_path):
        pass
    assert e.value.exit_code == 2
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid, "the loser does not touch the lock"


def test_a_killed_process_leaves_a_lock_that_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "lock").exists()
    with lock.run_folder(tmp_path) as notice:
        assert f"process {holder.pid}" in notice
        assert "taking over" in notice
    with lock.run_folder(tmp_path) as notice:
        assert notice is None


def test_of_many_processes_at_once_exactly_one_gets_it(tmp_path):
    code = HOLD.replace("time.sleep(60)", "sys.stdin.read()")
    pipes = ("stdin", "stdout", "stderr")
    crowd = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **dict.fromkeys(pipes, -1), text=True) for _ in range(6)
    ]
    losers = []
    while len(losers) < 5:
        losers = [c for c in crowd if c.poll() is not None]
    (winner,) = [c for c in crowd if c not in losers]
    assert winner.communicate()[0] == "None\n"
    assert all(f"process {winner.pid}" in c.communicate()[1] for c in losers)
