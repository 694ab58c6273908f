"""Oracle of objective/sppo: equation 4.7 in float64 numpy for both sources of P, and trl's ``sppo_hard``.

Bugs it is meant to catch: beta for 1/beta, the same target for both answers, P not centred at 1/2.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _referenced import build, check_formula, check_like_trl, pairs, random_pairs, sig, value

from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("objective/sppo")


@pytest.mark.parametrize("beta", [1e-3, 0.1])
def test_hard(beta):
    eta = 1 / beta

    def loss(x):
        return (x.dw - eta * (1 - 0.5)) ** 2 + (x.dl - eta * (0 - 0.5)) ** 2

    def gradients(x):
        return 2 * (x.dw - eta / 2), 2 * (x.dl + eta / 2)

    check_formula("sppo", loss, gradients, beta=beta)


def test_probabilities_from_scores():
    eta, scale = 1 / 0.05, 2.0

    def loss(x):
        p = sig(scale * x.gap)
        return (x.dw - eta * (p - 0.5)) ** 2 + (x.dl - eta * ((1 - p) - 0.5)) ** 2

    def gradients(x):
        p = sig(scale * x.gap)
        return 2 * (x.dw - eta * (p - 0.5)), 2 * (x.dl - eta * (0.5 - p))

    check_formula("sppo", loss, gradients, beta=0.05, preference="margin", scale=scale)


def test_sure_scores_are_hard_labels():
    b = replace(random_pairs(), margin=torch.full((16,), 1e3, dtype=torch.float64))
    np.testing.assert_allclose(value("sppo", b, preference="margin"), value("sppo", b), rtol=1e-12)


def test_data_without_scores_are_refused():
    b = replace(random_pairs(), margin=None)
    value("sppo", b)
    with pytest.raises(UsageError, match="none"):
        build("sppo", preference="margin")(b)


def test_as_trl():
    check_like_trl("sppo", "sppo_hard", options={"beta": 0.02}, beta=0.02)


def test_as_the_authors_code():
    """Recorded from ``sppo_loss`` of uclaml/SPPO with P 0.8 and 0.2, β 0.01; it halves the sum."""
    policy, reference = (
        ([-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0]),
        ([-13.0, -28.0, -8.0, -24.0], [-14.0, -25.0, -9.0, -19.5]),
    )
    b = pairs(*policy, *reference, margin=[np.log(4)] * 4)
    np.testing.assert_allclose(
        value("sppo", b, beta=0.01, preference="margin") / 2, [841.0, 1056.25, 862.90625, 799.625], rtol=1e-9
    )
