"""Oracle of objective/f-dpo: theorem 1 with derivatives of f taken numerically from f itself, limits, and trl.

Bugs it is meant to catch: f for f', 1/u with the wrong sign, alpha for 1 - alpha, an overflow of long answers.
"""

import numpy as np
import pytest
import torch
from _referenced import build, check_formula, check_like_trl, nls, pairs, random_pairs, sig, slopes, value

from metier.core.errors import UsageError
from metier.testing import check_part

SMALL = random_pairs(scale=1.0)


def f_js(u):
    return u * np.log(u) - (u + 1) * np.log((u + 1) / 2)


F = {
    "reverse-kl": lambda u: u * np.log(u),
    "forward-kl": lambda u: -np.log(u),
    "js": f_js,
    "alpha": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * (0.3 - 1)),
}
TRL = [
    ({"divergence": "reverse-kl"}, {}),
    ({"divergence": "forward-kl"}, {"divergence": "forward_kl"}),
    ({"divergence": "js"}, {"divergence": "js_divergence"}),
    ({"divergence": "alpha", "alpha": 0.3}, {"divergence": "alpha_divergence", "coef": 0.7}),
    ({"divergence": "alpha", "alpha": 1.0}, {"divergence": "alpha_divergence", "coef": 0.0}),
]


def test_contract():
    check_part("objective/f-dpo")


@pytest.mark.parametrize("divergence", list(F))
def test_against_derivatives_of_the_divergence(divergence):
    """F is f' up to a constant; central differences of the generator with its name."""

    def slope(d):
        u, step = np.exp(d), 1e-5 * np.exp(d)
        return (F[divergence](u + step) - F[divergence](u - step)) / (2 * step)

    d = SMALL.chosen_logps - SMALL.ref_chosen_logps, SMALL.rejected_logps - SMALL.ref_rejected_logps
    expected = nls(0.4 * (slope(d[0].numpy()) - slope(d[1].numpy())))
    np.testing.assert_allclose(value("f-dpo", SMALL, beta=0.4, divergence=divergence, alpha=0.3), expected, rtol=1e-6)


@pytest.mark.parametrize("divergence", ["forward-kl", "js", "alpha"])
def test_gradient(divergence):
    beta, a = 0.4, 0.3
    rate = {"forward-kl": lambda d: np.exp(-d), "js": lambda d: sig(-d), "alpha": lambda d: np.exp(-a * d)}[divergence]
    prime = {"forward-kl": lambda d: -np.exp(-d), "js": lambda d: -nls(d), "alpha": lambda d: -np.exp(-a * d) / a}[divergence]

    def z(x):
        return beta * (prime(x.dw) - prime(x.dl))

    def gradients(x):
        return -beta * sig(-z(x)) * rate(x.dw), beta * sig(-z(x)) * rate(x.dl)

    check_formula("f-dpo", lambda x: nls(z(x)), gradients, batch=SMALL, beta=beta, divergence=divergence, alpha=a)


def test_reductions():
    b = random_pairs()
    np.testing.assert_allclose(value("f-dpo", b, divergence="reverse-kl"), value("dpo", b), rtol=1e-12)
    np.testing.assert_allclose(value("f-dpo", b, divergence="alpha", alpha=1e-6), value("dpo", b), rtol=1e-4)
    one = value("f-dpo", b, divergence="alpha", alpha=1.0)
    np.testing.assert_allclose(one, value("f-dpo", b, divergence="forward-kl"), rtol=1e-12)


@pytest.mark.parametrize("divergence", list(F))
def test_long_answers_stay_finite_in_float32(divergence):
    b = pairs([-5e3, 0.0], [0.0, -5e3], [0.0, 0.0], [0.0, 0.0])
    b = type(b)(*(v.float() for v in vars(b).values() if isinstance(v, torch.Tensor)))
    assert torch.isfinite(value("f-dpo", b, divergence=divergence)).all()
    assert all(np.isfinite(g).all() for g in slopes("f-dpo", b, divergence=divergence))


@pytest.mark.parametrize(("options", "settings"), TRL)
def test_as_trl(options, settings):
    check_like_trl("f-dpo", "sigmoid", batch=random_pairs(scale=2.0), options=options, **settings)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_range_of_alpha(alpha):
    with pytest.raises(UsageError, match="alpha"):
        build("f-dpo", divergence="alpha", alpha=alpha)


def test_an_unknown_divergence_is_named():
    with pytest.raises(UsageError, match="divergence"):
        build("f-dpo", divergence="total-variation")
