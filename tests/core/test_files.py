"""The file layer does what its names say; the fault tests build on it."""

import os
from pathlib import Path

import pytest

from metier.core import files


def test_fsync_reaches_the_system_for_files_and_folders(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or real(fd))
    files.write_new(tmp_path / "new", b"abc")
    files.fsync_folder(tmp_path)
    assert synced == [str(tmp_path / "new"), str(tmp_path)]
    assert (tmp_path / "new").read_bytes() == b"abc"


def test_a_short_write_is_continued(tmp_path):
    class Slow:
        def __init__(self) -> None:
            self.got = b""

        def write(self, data) -> int:
            self.got += bytes(data[:3])
            return min(3, len(data))

    slow = Slow()
    files.write(slow, b"0123456789")
    assert slow.got == b"0123456789"


def test_create_refuses_what_exists(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "x")


def test_rmtree_does_not_follow_links(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").touch()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "precious")
    files.rmtree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    assert (tmp_path / "precious" / "file").exists()
