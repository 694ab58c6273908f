"""Oracle of optimizer/adafactor: algorithms 4 and 5 in NumPy, transformers' and torch's implementations."""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.optim import Step


def rms(x):
    return np.sqrt(np.mean(x**2))


def formula(course, lr, wd, beta1, beta2, clip, scale, relative, eps1=1e-30, eps2=1e-3):
    p, out = course.start.copy(), []
    r = c = v = m = 0.0
    for t, g in enumerate(course.grads, start=1):
        b = 1 - t**-0.8 if beta2 is None else beta2
        square = g**2 + eps1
        if p.ndim >= 2:
            r = b * r + (1 - b) * square.mean(-1)
            c = b * c + (1 - b) * square.mean(-2)
            v = r[..., :, None] * c[..., None, :] / r.mean(-1)[..., None, None]
        else:
            v = b * v + (1 - b) * square
        u = g / np.sqrt(v)
        if clip:
            u = u / max(1.0, rms(u) / clip)
        if scale:
            u = u * max(eps2, rms(p))
        if relative:
            u = u * min(1e-2, 1 / np.sqrt(t))
        m = beta1 * m + (1 - beta1) * u if beta1 else u
        p = p * (1 - lr * wd) - lr * m
        out.append(p)
    return np.stack(out)


@pytest.mark.parametrize(
    ("beta1", "beta2", "clip", "scale", "relative"),
    [(0.9, None, 1.0, False, False), (0.0, 0.99, None, False, False), (0.9, 0.9, 0.5, True, False),
     (0.0, None, 1.0, True, True)],
)  # fmt: skip
def test_formula(course, beta1, beta2, clip, scale, relative):
    options = {
        "beta1": beta1,
        "beta2": beta2,
        "clip": clip,
        "scale_parameter": scale,
        "relative_step": relative,
    }
    got = course.run("adafactor", **options)
    wanted = formula(course, 0.03, 0.1, beta1, beta2, clip, scale, relative)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [False, True])
def test_as_transformers(course, scale):
    from transformers.optimization import Adafactor

    def make(p):
        return Adafactor([p], lr=0.03, relative_step=False, scale_parameter=scale)

    got = course.run("adafactor", weight_decay=0.0, beta1=0.0, scale_parameter=scale)
    np.testing.assert_allclose(got, course.follow(make), rtol=1e-9, atol=1e-12)


def test_relative_step_as_transformers(course):
    from transformers.optimization import Adafactor

    got = course.run("adafactor", lr=1.0, weight_decay=0.0, beta1=0.0, scale_parameter=True, relative_step=True)
    np.testing.assert_allclose(got, course.follow(lambda p: Adafactor([p])), rtol=1e-9, atol=1e-12)


def test_as_torch(make_course):
    """torch always multiplies by max(eps2, RMS(p)), and caps the learning rate at 1/√t (not reached here)."""
    course = make_course((4, 6))

    def make(p):
        return torch.optim.Adafactor([p], lr=0.03, weight_decay=0.1, eps=(1e-30, 1e-3))

    got = course.run("adafactor", beta1=0.0, scale_parameter=True)
    np.testing.assert_allclose(got, course.follow(make), rtol=1e-5, atol=1e-8)


def test_a_rank_one_square_is_kept_exactly():
    rng = np.random.default_rng(3)
    g = torch.tensor(np.outer(rng.normal(size=5), rng.normal(size=7)))
    rule = part.build("optimizer", {"adafactor": {"beta1": 0.0, "beta2": 0.0, "eps1": 0.0, "clip": None}}).obj
    direction = rule.update(g, torch.zeros_like(g), rule.init(g), Step(t=1, lr=1.0))
    torch.testing.assert_close(direction, g.sign())


def test_the_second_moment_of_a_matrix_is_rows_plus_columns():
    rule = part.build("optimizer", {"adafactor": {"beta1": 0.0}}).obj
    state = rule.init(torch.zeros(40, 60))
    assert sum(v.numel() for v in state.values()) == 100


def test_the_scale_of_the_loss_does_not_matter_up_to_eps(course):
    scaled = type(course)(course.start.shape)
    scaled.grads = [1000 * g for g in scaled.grads]
    np.testing.assert_allclose(scaled.run("adafactor"), course.run("adafactor"), rtol=1e-10)
    assert not np.allclose(scaled.run("adafactor", eps1=0.1, clip=None), course.run("adafactor", eps1=0.1, clip=None), rtol=1e-3)
