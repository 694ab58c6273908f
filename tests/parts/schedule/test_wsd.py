"""Oracle of schedule/wsd: the shapes in NumPy, transformers' schedule, and the piecewise plateau of a continued run.

Bugs it is meant to catch: a decay that starts a step early or late, ends above 0, is exponential without its offset, or a
drop that is forgotten inside the decay.
"""

import numpy as np
import pytest
import torch
from transformers import get_wsd_schedule

from metier.core import part
from metier.core.clock import Clock
from metier.core.schedule import Schedule


def curve(steps, warmup=0.0, **options):
    schedule = Schedule(part.build("schedule", {"wsd": options}), warmup=warmup)
    return np.array([schedule.at(Clock(s, steps)) for s in range(steps + 1)])


SHAPES = {
    "linear": lambda y: 1 - y,
    "sqrt": lambda y: 1 - np.sqrt(y),
    "cosine": lambda y: (1 + np.cos(np.pi * y)) / 2,
    "exponential": lambda y: (np.exp(1 - y) - 1) / (np.e - 1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_formula(shape, final):
    got = curve(100, decay=0.3, shape=shape, final=final)
    y = np.arange(31) / 30
    np.testing.assert_array_equal(got[:70], 1.0)
    np.testing.assert_allclose(got[70:], final + (1 - final) * SHAPES[shape](y), atol=1e-12)


@pytest.mark.parametrize(("shape", "theirs"), [("linear", "linear"), ("sqrt", "1-sqrt"), ("cosine", "cosine")])
def test_as_transformers_after_warmup(shape, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    f = get_wsd_schedule(optimizer, num_warmup_steps=10, num_stable_steps=60, num_decay_steps=30, decay_type=theirs).lr_lambdas[0]
    got = curve(100, warmup=10, decay=30 / 90, shape=shape)
    np.testing.assert_allclose(got[10:], [f(s) for s in range(10, 101)], atol=1e-12)


def test_the_stable_stretch_does_not_depend_on_the_length():
    """So a run can be continued from any checkpoint before its decay."""
    np.testing.assert_array_equal(curve(100, warmup=5)[:81], curve(1000, warmup=5)[:81])


def test_no_decay_and_nothing_but_decay():
    np.testing.assert_array_equal(curve(10, decay=0.0), 1.0)
    np.testing.assert_allclose(curve(10, decay=1.0, shape="linear"), 1 - np.arange(11) / 10)


@pytest.mark.parametrize("shape", SHAPES)
def test_ends_are_exact(shape):
    got = curve(64, decay=0.25, shape=shape)
    assert got[48] == 1.0
    assert got[64] == 0.0


def test_a_continued_run_keeps_its_plateau_and_then_a_lower_one():
    """The shorter run of 100 would have begun its decay at 80, which is 0.4 of 200."""
    got = curve(200, decay=0.2, shape="linear", drop=0.5, drop_at=0.4)
    np.testing.assert_array_equal(got[:80], 1.0)
    np.testing.assert_array_equal(got[80:160], 0.5)
    np.testing.assert_allclose(got[160:], 0.5 * (1 - np.arange(41) / 40), atol=1e-12)
