"""Oracle of objective/cdpo: Mitchell's equation 3 in float64 numpy.

Bugs it is meant to catch: the weights of the two terms exchanged, ε left out of one, beta outside the logistic.
"""

import numpy as np
import pytest
from _referenced import build, check_formula, nls, pairs, random_pairs, sig, slopes, value

from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("objective/cdpo")


@pytest.mark.parametrize(("beta", "e"), [(0.1, 0.1), (1.0, 0.3), (0.5, 0.0)])
def test_formula_and_gradient(beta, e):
    def loss(x):
        return (1 - e) * nls(beta * x.h) + e * nls(-beta * x.h)

    def gradients(x):
        slope = -beta * (sig(-beta * x.h) - e)
        return slope, -slope

    check_formula("cdpo", loss, gradients, beta=beta, label_smoothing=e)


@pytest.mark.parametrize("e", [0.05, 0.2, 0.4])
def test_the_gradient_changes_its_sign_where_the_margin_has_the_log_odds_of_the_labels(e):
    best = np.log((1 - e) / e) / 0.5
    g_w, g_l = slopes("cdpo", pairs([best - 0.1, best, best + 0.1], [0.0] * 3, [0.0] * 3, [0.0] * 3), beta=0.5, label_smoothing=e)
    assert g_w[0] < 0 < g_w[2]
    assert g_w[1] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(g_l, -g_w)


def test_without_smoothing_it_is_dpo():
    b = random_pairs()
    np.testing.assert_allclose(value("cdpo", b, label_smoothing=0.0), value("dpo", b), rtol=1e-12)


@pytest.mark.parametrize("e", [-0.1, 0.5, 0.7])
def test_rates_of_a_half_or_more_are_refused(e):
    with pytest.raises(UsageError, match="label_smoothing"):
        build("cdpo", label_smoothing=e)
