"""Oracle of objective/aot: sorted margins in float64 numpy, trl's, invariances, DPO.

Bugs it is meant to catch: one side sorted, losses in sorted places, β at the wrong place, smoothing on the wrong side.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _pairwise import at_reference, build, letters, one_by_one, pairs, picked, sig, slopes, softplus, trl_dpo, values

from metier.core import part
from metier.testing import check_part


def test_contract():
    check_part("objective/aot")


def crossed():
    """Pairs whose policy and reference margins are ordered differently."""
    b = pairs(count=7)
    order = torch.tensor([3, 6, 0, 5, 1, 2, 4])
    return replace(b, ref_chosen_logps=b.ref_chosen_logps[order], ref_rejected_logps=b.ref_rejected_logps[order])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_formula_in_place_and_its_gradient(smoothing):
    b = crossed()
    u = letters(b).m
    v = np.sort((b.ref_chosen_logps - b.ref_rejected_logps).numpy())
    z = 0.3 * (u - v[np.argsort(np.argsort(u))])  # each pair against the reference margin of its own rank
    objective = build("aot", beta=0.3, label_smoothing=smoothing)
    np.testing.assert_allclose(values(objective, b), (1 - smoothing) * softplus(-z) + smoothing * softplus(z), rtol=1e-12)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, -0.3 * (sig(-z) - smoothing), rtol=1e-10)
    np.testing.assert_allclose(g_l, -g_w, rtol=1e-12)
    assert not np.allclose(values(objective, b).mean(), values(build("dpo", beta=0.3), b).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_as_trl(smoothing):
    pytest.importorskip("trl")
    b = pairs(count=9, seed=4)
    order = torch.tensor([4, 2, 8, 0, 3, 7, 1, 5, 6])
    shuffled = picked(b, order)
    tokens = replace(b.tokens, logps=2.5 * b.tokens.logps)
    b = replace(b, tokens=tokens, chosen_logps=2.5 * b.chosen_logps, rejected_logps=2.5 * b.rejected_logps)
    for pairs_ in (b, shuffled):
        theirs = trl_dpo(pairs_, "aot", beta=0.3, label_smoothing=smoothing).item()
        assert values(build("aot", beta=0.3, label_smoothing=smoothing), pairs_).mean() == pytest.approx(theirs, rel=1e-12)


def test_one_pair_is_dpo():
    b = crossed()
    ours = [values(build("aot", beta=0.3), p)[0] for p in one_by_one(b)]
    np.testing.assert_allclose(ours, values(build("dpo", beta=0.3), b), rtol=1e-12)


def test_reference_margins_may_be_paired_anew():
    b, order = crossed(), torch.tensor([6, 1, 4, 2, 0, 3, 5])
    moved = replace(b, ref_chosen_logps=b.ref_chosen_logps[order], ref_rejected_logps=b.ref_rejected_logps[order])
    np.testing.assert_allclose(values(build("aot"), moved), values(build("aot"), b), rtol=1e-12)
    assert not np.allclose(values(build("dpo"), moved), values(build("dpo"), b))


def test_order_at_the_reference_and_needs():
    order = torch.tensor([6, 1, 4, 2, 0, 3, 5])
    np.testing.assert_allclose(values(build("aot"), picked(crossed(), order)), values(build("aot"), crossed())[order], rtol=1e-12)
    np.testing.assert_allclose(values(build("aot"), at_reference(pairs())), np.log(2), rtol=1e-12)
    assert part.load("objective/aot").__metier__.needs == {"reference", "batch"}
