"""Oracle of objective/robust-dpo: the unbiased estimate in float64 numpy, its expectation over flips, and trl's ``robust``.

Bugs it is meant to catch: plus and minus exchanged (which gives cdpo), the factor ``1/(1-2ε)`` forgotten.
"""

import numpy as np
import pytest
from _referenced import build, check_formula, check_like_trl, nls, pairs, random_pairs, sig, slopes, value

from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("objective/robust-dpo")


@pytest.mark.parametrize(("beta", "e"), [(0.1, 0.1), (1.0, 0.3), (0.5, 0.0)])
def test_formula_and_gradient(beta, e):
    def loss(x):
        return ((1 - e) * nls(beta * x.h) - e * nls(-beta * x.h)) / (1 - 2 * e)

    def gradients(x):
        slope = -beta * ((1 - e) * sig(-beta * x.h) + e * sig(beta * x.h)) / (1 - 2 * e)
        return slope, -slope

    check_formula("robust-dpo", loss, gradients, beta=beta, label_smoothing=e)


@pytest.mark.parametrize("e", [0.1, 0.35])
def test_its_expectation_over_flips_is_dpo_on_clean_labels(e):
    b = random_pairs()
    flipped = pairs(b.rejected_logps, b.chosen_logps, b.ref_rejected_logps, b.ref_chosen_logps)
    expected = (1 - e) * value("robust-dpo", b, label_smoothing=e) + e * value("robust-dpo", flipped, label_smoothing=e)
    np.testing.assert_allclose(expected, value("dpo", b), rtol=1e-9)


def test_it_has_no_lower_bound_and_never_stops():
    far = pairs([1e4], [0.0], [0.0], [0.0])
    assert value("robust-dpo", far, beta=1.0, label_smoothing=0.1).item() < -1e2
    assert slopes("robust-dpo", far, beta=1.0, label_smoothing=0.1)[0].item() == pytest.approx(-0.1 / 0.8)


def test_without_smoothing_it_is_dpo():
    b = random_pairs()
    np.testing.assert_allclose(value("robust-dpo", b, label_smoothing=0.0), value("dpo", b), rtol=1e-12)


def test_as_trl():
    check_like_trl("robust-dpo", "robust", options={"label_smoothing": 0.2, "beta": 0.3}, label_smoothing=0.2, beta=0.3)


def test_a_half_is_refused():
    with pytest.raises(UsageError, match="label_smoothing"):
        build("robust-dpo", label_smoothing=0.5)
