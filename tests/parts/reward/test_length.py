"""Oracle of reward/length: lengths counted by hand."""

import pytest

from metier.core import part
from metier.testing import check_part


def reward(**options):
    return part.build("reward", {"length": options}).obj


def test_contract():
    check_part("reward/length")


TEXTS = [["one two  three", "", "don't\nstop"], ["a"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[3, 0, 2], [1, 0, 0]]),
        ({"unit": "characters"}, [[14, 0, 10], [1, 0, 0]]),
        ({"target": 2}, [[-1, -2, 0], [-1, -2, -2]]),
        ({"target": 2, "scale": 0.5}, [[-0.5, -1, 0], [-0.5, -1, -1]]),
        ({"target": 0}, [[-3, 0, -2], [-1, 0, 0]]),
        ({"scale": 0.1}, [[pytest.approx(0.3), 0, pytest.approx(0.2)], [pytest.approx(0.1), 0, 0]]),
    ],
)
def test_by_hand(options, expected):
    assert reward(**options)(["p", "q"], TEXTS, None).tolist() == expected
