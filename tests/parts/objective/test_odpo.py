"""Oracle of objective/odpo: the offset in float64 numpy, and what is refused.

Bugs it is meant to catch: the offset added, beta on the offset, a gap of 0 or below passed on as NaN or infinity.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _referenced import build, check_formula, nls, pairs, random_pairs, sig, value

from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("objective/odpo")


@pytest.mark.parametrize(("offset", "f"), [("log", np.log), ("linear", np.abs)])
def test_formula_and_gradient(offset, f):
    beta, alpha = 0.3, 0.7

    def z(x):
        return beta * x.h - alpha * f(x.gap)

    def gradients(x):
        return -beta * sig(-z(x)), beta * sig(-z(x))

    check_formula("odpo", lambda x: nls(z(x)), gradients, beta=beta, alpha=alpha, offset=offset)


def test_reductions():
    b = random_pairs()
    np.testing.assert_allclose(value("odpo", b, alpha=0.0), value("dpo", b), rtol=1e-12)
    ones = replace(b, margin=torch.ones(16, dtype=torch.float64))
    np.testing.assert_allclose(value("odpo", ones), value("dpo", b), rtol=1e-12)


def test_metrics_are_those_of_the_policy():
    b = random_pairs()
    metrics = build("odpo")(b)[1]
    np.testing.assert_allclose(metrics["margin"], build("dpo")(b)[1]["margin"], rtol=1e-12)
    np.testing.assert_allclose(metrics["offset"], np.log(b.margin), rtol=1e-12)


def test_data_without_scores_are_refused():
    with pytest.raises(UsageError, match="none") as e:
        build("odpo")(replace(random_pairs(), margin=None))
    assert "score_chosen" in str(e.value)


def test_scores_that_contradict_the_order_are_counted():
    margin = torch.ones(16, dtype=torch.float64)
    margin[[1, 4, 6]] = torch.tensor([0.0, -1.0, float("nan")], dtype=torch.float64)
    with pytest.raises(UsageError, match="in 3 of 16 pairs"):
        build("odpo")(replace(random_pairs(), margin=margin))
    with pytest.raises(UsageError, match="in 2 of 16 pairs"):
        build("odpo", offset="linear")(replace(random_pairs(), margin=margin))


def test_as_the_authors_code():
    """Recorded from ``preference_loss`` of rycolab/odpo c4a01be9 with ``offset``: β 0.2, its default α, scores of both answers."""
    gap = torch.tensor([2.0, 0.9, 3.5, 0.25]) - torch.tensor([0.5, 0.2, 0.0, -1.0])
    policy, reference = (
        ([-12.0, -30.5, -7.25, -21.0], [-15.0, -22.5, -9.5, -20.0]),
        ([-13.0, -28.0, -8.0, -24.0], [-14.0, -25.0, -9.0, -19.5]),
    )
    expected = [0.69588347, 1.06567485, 1.31528233, 0.48287768]
    np.testing.assert_allclose(value("odpo", pairs(*policy, *reference, margin=gap), beta=0.2), expected, atol=1e-7)
