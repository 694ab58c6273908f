"""Oracle of objective/length-normalized: ln-dpo, simple losses worked out per token, and what is refused.

Bugs it is meant to catch: the reference left as sums, lengths left as they are (averages of averages), one answer's length for both.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _referenced import build, random_pairs, slopes, value

from metier.core.batch import Lists, Rated
from metier.parts.objective.length_normalized import per_token
from metier.testing import check_part


def test_contract():
    check_part("objective/length-normalized")


def test_around_dpo_it_is_ln_dpo():
    b, of = random_pairs(), {"dpo": {"beta": 3.0}}
    np.testing.assert_allclose(value("length-normalized", b, of=of), value("ln-dpo", b, beta=3.0), rtol=1e-12)
    for found, expected in zip(slopes("length-normalized", b, of=of), slopes("ln-dpo", b, beta=3.0), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["ln-dpo", "ipo", "nll"])
def test_what_averages_already_does_not_change(name):
    b = random_pairs()
    np.testing.assert_allclose(value("length-normalized", b, of=name), value(name, b), rtol=1e-12)


def test_length_penalties_vanish():
    b = random_pairs()
    of = {"r-dpo": {"alpha": 3.0, "beta": 5.0}}
    np.testing.assert_allclose(value("length-normalized", b, of=of), value("ln-dpo", b), rtol=1e-12)


def test_empty_answers_stay_finite():
    b = replace(random_pairs(), chosen_len=torch.zeros(16, dtype=torch.float64))
    assert torch.isfinite(value("length-normalized", b, of="dpo")).all()


def test_single_and_listed_answers():
    n = torch.tensor([2.0, 4.0])
    rated = per_token(Rated(torch.tensor([-2.0, -8.0]), n, torch.tensor([True, False]), torch.tensor([-4.0, -4.0])))
    assert (rated.logps.tolist(), rated.ref_logps.tolist(), rated.length.tolist()) == ([-1, -2], [-2, -1], [1, 1])
    listed = per_token(Lists(torch.tensor([[-6.0, 0.0]]), torch.tensor([[3.0, 0.0]]), n[None], torch.tensor([[True, False]])))
    assert (listed.logps.tolist(), listed.length.tolist()) == ([[-2, 0]], [[1, 1]])
    assert listed.ref_logps is None


def test_the_batch_type_and_needs_are_those_of_the_inner_objective():
    made = build("length-normalized", of="nll")
    assert made.needs == frozenset()
    assert build("length-normalized", of="dpo").needs == {"reference"}
