"""Oracle of optimizer/lion-a: the paper's formula in NumPy, and the two sizes it is about.

Bugs it is meant to catch: √κ forgotten or κ for √κ, Nesterov's mix from the old momentum, the inverse correction with
t - 1, weight decay scaled by √κ too.
"""

import math

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Step
from metier.parts.optimizer.lion_a import kappa


def formula(course, lr, wd, beta, nesterov, inverse):
    p, m, out = course.start.copy(), np.zeros_like(course.start), []
    for t, g in enumerate(course.grads, 1):
        m = beta * m + (1 - beta) * g
        c = beta * m + (1 - beta) * g if nesterov else m
        u = math.sqrt((1 - beta) / (1 + beta)) * np.sign(c) * (1 - beta**t if inverse else 1)
        p = (1 - lr * wd) * p - lr * u
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize(
    ("beta", "nesterov", "inverse"), [(0.9, False, False), (0.98, True, True), (0.5, True, False), (0.7, False, True)]
)
def test_formula(course, beta, nesterov, inverse):
    got = course.run("lion-a", beta=beta, nesterov=nesterov, inverse_bias_correction=inverse)
    np.testing.assert_allclose(got, formula(course, 0.03, 0.1, beta, nesterov, inverse), rtol=1e-12)


def test_nesterov_makes_a_difference(matrix):
    plain, mixed = (matrix.run("lion-a", beta=0.5, nesterov=n) for n in (False, True))
    assert not np.allclose(plain, mixed)


def test_without_momentum_it_is_sign_sgd(matrix):
    got = matrix.run("lion-a", beta=0.0, weight_decay=0.0)
    np.testing.assert_allclose(got[-1], matrix.start - 0.03 * sum(np.sign(g) for g in matrix.grads), rtol=1e-12)


def moved(rule, grads):
    """Directions on a sequence of gradients, as moves of a parameter at zero with lr 1."""
    p = torch.zeros_like(grads[0])
    state, out = rule.init(p), []
    for t, g in enumerate(grads, 1):
        before = p.clone()
        rule.apply([p], [g], [state], Step(t=t, lr=1.0, peak=1.0))
        out.append(before - p)
    return out, state


@pytest.mark.parametrize("beta", [0.9, 0.98])
def test_momentum_of_white_noise_has_the_predicted_size(beta):
    source = torch.Generator().manual_seed(0)
    grads = [torch.randn(200_000, generator=source) for _ in range(60)]
    rule = part.build("optimizer", {"lion-a": {"beta": beta}}).obj
    p = torch.zeros(200_000)
    state = rule.init(p)
    for t, g in enumerate(grads, 1):
        rule.apply([p], [g], [state], Step(t=t, lr=1.0, peak=1.0))
        if t in (1, 2, 5, 20, 60):
            seen = (state["m"] / (1 - beta**t)).square().mean().sqrt().item()
            assert seen == pytest.approx(math.sqrt(kappa(beta) * (1 + beta**t) / (1 - beta**t)), rel=0.01)


def test_size_is_that_of_adamw_in_the_long_run_and_from_the_first_step():
    source = torch.Generator().manual_seed(1)
    grads = [torch.randn(20_000, generator=source) for _ in range(100)]
    mine, _ = moved(part.build("optimizer", "lion-a").obj, grads)
    adam, _ = moved(part.build("optimizer", {"adamw": {"beta2": 0.99}}).obj, grads)
    sizes = [u.square().mean().sqrt().item() for u in mine]
    assert sizes == pytest.approx([math.sqrt(1 / 19)] * 100, rel=1e-4)
    late = [u.square().mean().sqrt().item() for u in adam]
    assert late[0] == pytest.approx(1.0, rel=1e-3)
    assert np.mean(late[60:]) == pytest.approx(math.sqrt(1 / 19), rel=0.02)
