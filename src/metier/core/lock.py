"""One writer per run folder.

The file ``lock`` is held with ``flock`` and names process and host. The kernel releases it when the process
ends, however it ends; a file that is still there but not held is therefore the trace of a process that died,
and is taken over.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metier.core.errors import UsageError

NAME = "lock"
_ELSEWHERE = "Choose another folder with out=…"
_REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "part of the path is not a folder",
    errno.ENOSPC: "no space left on the device",
}


@contextlib.contextmanager
def run_folder(folder: Path) -> Iterator[str | None]:
    """Create ``folder`` and hold it; a folder created here that is still empty on leaving goes away again.

    Gives a notice when the lock of a dead process was taken over, else ``None``. Raises ``UsageError`` when
    the folder cannot be used, or when a live process (this one included) holds it.
    """
    folder = Path(folder)
    created = _create(folder)
    fd, left = _acquire(folder)
    try:
        yield _takeover(left)
    finally:
        # Removed while held: whoever opened it meanwhile sees that it is no longer the file of that name.
        with contextlib.suppress(OSError):
            if _same_file(fd, folder / NAME):
                (folder / NAME).unlink()
        os.close(fd)
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _create(folder: Path) -> bool:
    try:
        if folder.is_dir():
            return False
        folder.mkdir(parents=True)
    except FileExistsError:
        if folder.is_dir():
            return False
        raise UsageError(f"{folder} cannot be the run folder: it is not a folder", hint=_ELSEWHERE) from None
    except OSError as e:
        raise _unusable(folder, e) from None
    return True


def _unusable(folder: Path, e: OSError) -> UsageError:
    reason = _REASONS.get(e.errno or 0, e.strerror or str(e))
    shown = str(folder) if len(str(folder)) < 120 else f"…{str(folder)[-100:]}"
    return UsageError(f"{shown} cannot be the run folder: {reason}", hint=_ELSEWHERE)


def _acquire(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """An open, held descriptor of the lock file, and what a dead process has left in it."""
    path = folder / NAME
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise _unusable(folder, e) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _same_file(fd, path):
                os.close(fd)
                continue
            left = _owner(fd)
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BlockingIOError:
            owner = _named_owner(fd)
            os.close(fd)
            raise _held(folder, owner) from None
        except OSError as e:
            os.close(fd)
            raise _unusable(folder, e) from None
        return fd, left


def _held(folder: Path, owner: dict[str, Any]) -> UsageError:
    pid, host = owner.get("pid"), owner.get("host")
    where = f" on {host}" if host and host != socket.gethostname() else ""
    who = "this process" if pid == os.getpid() and not where else f"process {pid or 'unknown'}{where}"
    return UsageError(f"{folder} is in use by {who}", hint=f"Wait until it has ended, or stop it. {_ELSEWHERE}")


def _takeover(left: dict[str, Any] | None) -> str | None:
    if left is None:
        return None
    who = f"process {left.get('pid', 'unknown')} on {left.get('host', 'unknown')}"
    return f"{who} ended without closing this run; taking over"


def _named_owner(fd: int) -> dict[str, Any]:
    """Who holds the lock; one that has only just got it is given a second to write its name."""
    for _ in range(20):
        if owner := _owner(fd):
            return owner
        time.sleep(0.05)
    return {}


def _owner(fd: int) -> dict[str, Any] | None:
    """What the lock file says, or ``None`` when it is empty; anything unreadable is an unknown owner."""
    raw = os.pread(fd, 4096, 0)
    if not raw:
        return None
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _same_file(fd: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except OSError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
