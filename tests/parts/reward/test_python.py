"""reward/python: a user's function, and everything that can be wrong with it."""

import pytest

from metier.core import part
from metier.core.errors import UsageError
from metier.testing import check_part

TEXT = """
import numpy as np
import torch


def count(prompts, completions, answers):
    return [[len(c) for c in row] for row in completions]


def as_tensor(prompts, completions, answers):
    return torch.tensor([[float(c == a) for c in row] for row, a in zip(completions, answers)], requires_grad=True)


def as_array(prompts, completions, answers):
    return np.array([[len(p) for c in row] for p, row in zip(prompts, completions)])


def missing(prompts, completions, answers):
    return [[None, float("nan")] for _ in prompts]


def infinite(prompts, completions, answers):
    return [[float("inf")] * len(row) for row in completions]


def words(prompts, completions, answers):
    return [["good"] * len(row) for row in completions]


def short(prompts, completions, answers):
    return [[1.0] for _ in prompts]


def few(prompts, completions, answers):
    return []


number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TEXT)
    return path


def reward(file, name, **options):
    return part.build("reward", {"python": {"function": f"{file}:{name}", **options}}).obj


def test_contract():
    check_part("reward/python")


def test_lists_tensors_and_arrays(file):
    assert reward(file, "count")(["p", "q"], [["a"], ["bb", ""]], None).tolist() == [[1, 0], [2, 0]]
    got = reward(file, "as_tensor")(["p", "q"], [["a", "b"], ["b", "c"]], ["b", "b"])
    assert got.tolist() == [[0, 1], [1, 0]]
    assert not got.requires_grad
    assert reward(file, "as_array")(["p", "qq"], [["a", "b"], ["b", "c"]], None).tolist() == [[1, 1], [2, 2]]


def test_missing_ratings(file):
    got = reward(file, "missing", allow_missing=True)(["p"], [["a", "b"]], None)
    assert got.isnan().all()
    with pytest.raises(UsageError, match="allow_missing"):
        reward(file, "missing")(["p"], [["a", "b"]], None)


@pytest.mark.parametrize(
    ("name", "why"),
    [("infinite", "gave inf"), ("words", "expected a number"), ("short", "1 rewards for 2"), ("few", "0 prompts")],
)
def test_bad_results(file, name, why):
    with pytest.raises(UsageError, match=why):
        reward(file, name)(["p"], [["a", "b"]], None)


def test_bad_names(file, tmp_path):
    with pytest.raises(UsageError, match=r"count"):
        reward(file, "cuont")
    with pytest.raises(UsageError, match="function of"):
        reward(file, "number")
    with pytest.raises(UsageError, match="no Python file"):
        reward(tmp_path / "other.py", "count")
    for bad in ("mine.py", "mine.py:a b", "mine.py:", ":count", "mine.py:__import__('os')"):
        with pytest.raises(UsageError, match="form file.py:name"):
            part.build("reward", {"python": {"function": bad}})


def test_a_file_that_fails(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        reward(path, "f")


def test_modules():
    assert reward("metier.parts.reward.length", "length")(["p"], [["a b"]], None).tolist() == [[2]]
    with pytest.raises(UsageError, match="function of"):
        reward("metier.parts.reward.length", "lenght")
    with pytest.raises(UsageError, match="cannot be imported"):
        reward("metier.no_such", "f")
    with pytest.raises(UsageError, match="no Python file"):
        reward("no_such_package.module", "f")
