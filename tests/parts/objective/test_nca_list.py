"""Oracle of objective/nca-list: the NCA formula in numpy loops, as the released code computes it (four answers, batch mean).

Bugs it is meant to catch: 1/K of the padded width, the noise term weighted by q, its sign.
"""

import numpy as np
import pytest
from _listwise import drawn, scored, softmax
from _pairwise import build, of, sig, values

from metier.testing import check_part

LOGPS, REF, SCORE = drawn(9)


def nca_list(logps=LOGPS, ref=REF, score=SCORE, **options):
    return scored("nca-list", logps, score, ref, **options)[:2]


def test_contract():
    check_part("objective/nca-list")


@pytest.mark.parametrize(("beta", "alpha"), [(0.01, 0.5), (0.5, 1.0), (0.1, 4.0)])
def test_formula_and_slope(beta, alpha):
    loss, slope = nca_list(beta=beta, alpha=alpha)
    q, r = softmax(SCORE / alpha), beta * (LOGPS - REF)
    wanted = [sum(-q[i, k] * np.log(sig(r[i, k])) - np.log(sig(-r[i, k])) / 4 for k in range(4)) for i in range(3)]
    np.testing.assert_allclose(loss, wanted, rtol=1e-9)
    np.testing.assert_allclose(slope, beta * (sig(r) / 4 - q * sig(-r)), rtol=1e-8, atol=1e-15)


def test_start_of_training():
    loss, _ = nca_list(ref=LOGPS, alpha=0.5)
    np.testing.assert_allclose(loss, 2 * np.log(2), rtol=1e-12)


def test_optimum():
    """No slope at ``R = log(K q)``: unlike with InfoNCA a constant added to all rewards matters."""
    q = softmax(SCORE / 0.8)
    loss, slope = nca_list(REF + np.log(4 * q) / 0.3, beta=0.3, alpha=0.8)
    np.testing.assert_allclose(slope, 0, atol=1e-14)
    assert (nca_list(REF + np.log(4 * q) / 0.3 + 1, beta=0.3, alpha=0.8)[0] > loss).all()


def test_two_answers_and_a_sharp_label():
    """``-log σ(R_w) - ½ log σ(-R_w) - ½ log σ(-R_l)``: the pairwise loss."""
    loss, _ = nca_list(LOGPS[:, :2], REF[:, :2], np.tile([0.0, 1.0], (3, 1)), beta=0.3)
    low, win = (0.3 * (LOGPS - REF)[:, k] for k in (0, 1))
    wanted = np.log1p(np.exp(-win)) + np.log1p(np.exp(win)) / 2 + np.log1p(np.exp(low)) / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-10)
    pairs = of(LOGPS[:, 1], LOGPS[:, 0], rw=REF[:, 1], rl=REF[:, 0])
    np.testing.assert_allclose(loss, values(build("nca", beta=0.3), pairs), rtol=1e-10)


def test_slope_of_the_best_at_the_start():
    """Two answers: ``-β/4`` for the chosen, ``+β/4`` for the rejected."""
    _, slope = nca_list([[-3.0, -5.0]], [[-3.0, -5.0]], [[1.0, 0.0]], beta=0.2)
    np.testing.assert_allclose(slope, [[-0.05, 0.05]], rtol=1e-12)


def test_as_the_authors_code():
    """Recorded from ``nca_loss`` of thu-ml/Noise-Contrastive-Alignment without its bonus for the first answer: a mean over lists."""
    logps, ref = (
        [[-10.0, -14.0, -20.0, -8.0], [-31.0, -25.0, -12.0, -18.0]],
        [[-12.0, -13.0, -18.0, -9.0], [-30.0, -28.0, -11.0, -17.0]],
    )
    loss = nca_list(logps, ref, [[8.0, 7.0, 3.0, 5.0], [2.0, 9.0, 6.0, 6.0]], beta=0.05, alpha=2.0)[0]
    assert loss.mean() == pytest.approx(1.35771506, abs=1e-8)
