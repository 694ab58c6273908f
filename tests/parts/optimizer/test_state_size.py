"""How much state an optimizer keeps of a matrix [m, n], in numbers, as its paper's card says."""

import pytest
import torch

from metier.core import part

M, N = 6, 10
MN = M * N
SIZES = [
    ("sgd-momentum", {}, MN),
    ("signum", {}, MN),
    ("lion", {}, MN),
    ("adamw", {}, 2 * MN),
    ("gi-adam", {}, 2 * MN),
    ("adafactor", {"beta1": 0.0}, M + N),
    ("adafactor", {"beta1": 0.9}, MN + M + N),
    ("sophia", {}, 2 * MN),
    ("adalayer", {}, MN + 1),
    ("adalayer-star", {}, MN + 1),
    ("adaptive-subset", {}, MN),
    ("muon", {}, MN),
    ("l3rs", {}, 3 * MN + 15),  # and the averages that its controller sees
    ("lion-a", {}, MN),
    ("lion-ar", {}, MN + M),
    ("mars", {"base": "adamw"}, 3 * MN),
    ("mars", {"base": "lion"}, 2 * MN),
    ("mars", {"base": "shampoo"}, 2 * MN),
    ("soap", {}, 2 * MN + 2 * M * M + 2 * N * N),
    ("soap", {"one_sided": True}, 2 * MN + 2 * M * M),
    ("soap", {"factorized": True}, MN + M + N + 2 * M * M + 2 * N * N),
    ("asgo", {}, MN + M * M),
    ("dasgo", {}, MN + N),
    ("dion", {}, MN + M * M),  # full rank r = min(m, n); Q lies on the shorter side
]
SLACK = 4
"""Counters and other single numbers."""


@pytest.mark.parametrize(
    ("name", "options", "numbers"), SIZES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o, _ in SIZES]
)
def test_state_of_a_matrix(name, options, numbers):
    state = part.build("optimizer", {name: options}).obj.init(torch.zeros(M, N))
    held = sum(v.numel() for v in state.values())
    assert numbers <= held <= numbers + SLACK
