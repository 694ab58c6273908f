"""Records and results appear whole, with the permissions of any new file."""

import json
import math
import os

import pytest

from metier.core.runfolder import publish, write_json


@pytest.fixture
def mask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_records_are_json_and_readable(tmp_path, mask):
    path = tmp_path / "new" / "run.json"
    write_json(path, {"a": math.nan, "b": [math.inf, 1.5, ("x", None)]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5, ["x", None]]}
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_a_result_is_whole_or_absent_and_readable(tmp_path, mask):
    def fill(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("w")
        (folder / "sub" / "weights").chmod(0o600)

    target = publish(tmp_path / "model", fill)
    modes = [p.stat().st_mode & 0o777 for p in (target, target / "sub", target / "sub" / "weights")]
    assert modes == [0o755, 0o755, 0o644]

    def broken(folder):
        fill(folder)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        publish(tmp_path / "model", broken)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "sub" / "weights").read_text() == "w"
