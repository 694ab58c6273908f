"""The file operations a checkpoint is made of. All go through here, so a test can make any one fail."""

import contextlib
import os
from io import FileIO
from pathlib import Path


def mkdir(path: Path) -> None:
    """Create one new folder; its parent exists."""
    path.mkdir()


def create(path: Path) -> FileIO:
    """Open a file that does not exist yet, unbuffered, for writing."""
    return FileIO(path, "x")


def write(file: FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data``. Raises ``OSError`` when the disk is full or a limit is reached."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while view:
        done = file.write(view)
        view = view[done:]


def fsync(file: FileIO) -> None:
    """Wait until the storage says it has the file's content."""
    os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Wait until the storage has the folder's entries, such as a rename."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(source: Path, target: Path) -> None:
    """Rename; ``target`` is the old or the new thing at every moment."""
    source.replace(target)


def unlink(path: Path) -> None:
    """Remove a file or a link, not what the link points to."""
    path.unlink()


def rmdir(path: Path) -> None:
    """Remove an empty folder."""
    path.rmdir()


def rmtree(path: Path) -> None:
    """Remove a folder and what is in it. Links inside are removed, never followed."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            rmtree(entry)
        else:
            unlink(entry)
    rmdir(path)


def write_new(path: Path, data: bytes) -> None:
    """A new file with this content, on the storage when this returns."""
    with create(path) as file:
        write(file, data)
        fsync(file)


def remove_quietly(path: Path) -> None:
    """Remove a folder if possible; what is left over is tried again by a later clean-up."""
    with contextlib.suppress(OSError):
        rmtree(path)
