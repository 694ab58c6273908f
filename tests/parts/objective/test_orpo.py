"""Oracle of objective/orpo: equations 6 and 7 in float64 numpy, the authors' code, trl's odds ratio.

Bugs it is meant to catch: sums for means, 1 - p of the wrong side, cancellation as p → 1, λ on the likelihood.
"""

import numpy as np
import pytest
import torch
from _pairwise import Accelerator, build, letters, of, pairs, ref_randomised, sig, slopes, softplus, values

from metier.testing import check_part


def test_contract():
    check_part("objective/orpo")


def odds(a):
    return np.log(np.exp(a) / (1 - np.exp(a)))


@pytest.mark.parametrize("lam", [0.0, 0.1, 2.0])
def test_equations_and_their_gradient(lam):
    b, x = pairs(), letters(pairs())
    z = odds(x.aw) - odds(x.al)
    objective = build("orpo", lam=lam)
    np.testing.assert_allclose(values(objective, b), -x.aw + lam * softplus(-z), rtol=1e-10)
    g_w, g_l = slopes(objective, b)
    np.testing.assert_allclose(g_w, (-1 - lam * sig(-z) / (1 - np.exp(x.aw))) / x.nw, rtol=1e-9)
    np.testing.assert_allclose(g_l, lam * sig(-z) / (1 - np.exp(x.al)) / x.nl, rtol=1e-9, atol=1e-15)


def test_as_the_authors_code():
    """Recorded from the lines of xfactlab/orpo 208d2d64 ``compute_loss``, likelihood of each answer alone, α 0.25."""
    b = of([-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0], [5.0, 12.0, 4.0, 9.0], [6.0, 8.0, 5.0, 10.0])
    np.testing.assert_allclose(values(build("orpo", lam=0.25), b), [2.55997977, 2.68122536, 1.97315865, 2.55812281], atol=1e-8)


def test_odds_ratio_as_trl():
    pytest.importorskip("trl")
    from trl.experimental.orpo import ORPOTrainer

    trainer = object.__new__(ORPOTrainer)
    vars(trainer).update(beta=0.2, accelerator=Accelerator())
    x = letters(pairs())
    theirs = trainer.odds_ratio_loss(torch.tensor(x.aw), torch.tensor(x.al))[0]  # a loss to be subtracted, in float32
    np.testing.assert_allclose(values(build("orpo", lam=0.2), pairs()) + x.aw, -theirs.numpy(), atol=1e-5)


def test_close_to_certainty():
    """``1 - exp(-1e-5)`` has lost most digits in float32; the log-odds have not."""
    b = of([-1e-5], [-2e-5])
    for kind in (torch.float64, torch.float32):
        leaf = b.chosen_logps.detach().clone().to(kind).requires_grad_()
        loss, metrics = build("orpo")(type(b)(leaf, *(v.to(kind) for v in (b.rejected_logps, b.chosen_len, b.rejected_len))))
        loss.sum().backward()
        assert metrics["log_odds"].item() == pytest.approx(np.log(2), rel=1e-4)
        assert leaf.grad.item() == pytest.approx(-1 - 0.1 / 3 / 1e-5, rel=1e-3)


def test_equal_answers_and_likelihood():
    assert values(build("orpo"), of([-6.0], [-3.0], [4.0], [2.0]))[0] == pytest.approx(1.5 + 0.1 * np.log(2))
    x = letters(pairs())
    np.testing.assert_allclose(build("orpo")(pairs())[1]["nll"], -x.aw, rtol=1e-12)


def test_the_reference_is_ignored():
    np.testing.assert_array_equal(values(build("orpo"), pairs()), values(build("orpo"), ref_randomised(pairs())))
