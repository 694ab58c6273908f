"""Oracle of objective/with-margin: the offset in float64 numpy, odpo's linear offset, and the unit of the scale.

Bugs it is meant to catch: the sign of the offset, beta applied twice, metrics that show the lowered scores, the length of the
wrong answer.
"""

from dataclasses import replace

import numpy as np
import pytest
from _referenced import build, check_formula, nls, random_pairs, sig, value

from metier.core.errors import UsageError
from metier.testing import check_part


def test_contract():
    check_part("objective/with-margin")


def test_formula_and_gradient():
    beta, scale = 0.3, 2.0

    def z(x):
        return beta * (x.h - scale * x.gap)

    def gradients(x):
        return -beta * sig(-z(x)), beta * sig(-z(x))

    check_formula("with-margin", lambda x: nls(z(x)), gradients, of={"dpo": {"beta": beta}}, scale=scale)


def test_it_is_odpo_with_a_linear_offset():
    b = random_pairs()
    expected = value("odpo", b, beta=0.2, alpha=0.7, offset="linear")
    np.testing.assert_allclose(value("with-margin", b, of={"dpo": {"beta": 0.2}}, scale=0.7 / 0.2), expected, rtol=1e-12)


def test_per_token_the_mean_is_lowered_by_the_scale():
    b, scale = random_pairs(), 0.4
    h = (b.chosen_logps - b.ref_chosen_logps) / b.chosen_len - (b.rejected_logps - b.ref_rejected_logps) / b.rejected_len
    expected = nls(5 * (h - scale * b.margin).numpy())
    np.testing.assert_allclose(value("with-margin", b, of="ln-dpo", scale=scale, per="token"), expected, rtol=1e-9)
    inside = {"with-margin": {"of": {"dpo": {"beta": 5.0}}, "scale": scale}}
    np.testing.assert_allclose(value("length-normalized", b, of=inside), expected, rtol=1e-9)


def test_metrics_are_those_of_the_policy():
    b = random_pairs()
    found, expected = build("with-margin", of="dpo", scale=2.0)(b)[1], build("dpo")(b)[1]
    for name, v in expected.items():
        np.testing.assert_array_equal(found[name], v)
    np.testing.assert_allclose(found["offset"], 2 * b.margin)


def test_data_without_scores_are_refused():
    with pytest.raises(UsageError, match="objective/with-margin needs the scores"):
        build("with-margin", of="dpo")(replace(random_pairs(), margin=None))


def test_only_pairs():
    with pytest.raises(UsageError, match="objective/lm reads Tokens, but objective/with-margin changes Pairs"):
        build("with-margin", of="lm")
