"""Oracle of law/schedule-bound: curves made from the theorem term by term, the published table of final losses.

Bugs it is meant to catch: learning rate on the wrong side, weights of the whole run for a loss inside it, a schedule number
off by one, warmup left out, a profile at the wrong steps.
"""

import numpy as np
import pytest
from convex_oracle import PUBLISHED, theorem

from metier.core import laws, part
from metier.core.clock import Clock
from metier.core.errors import UsageError
from metier.core.schedule import Schedule
from metier.testing import check_part

REFS = ("constant", {"wsd": {"decay": 0.2, "shape": "linear"}}, "cosine")


def law(**options):
    return part.build("law", {"schedule-bound": options}).obj


def shape(ref, steps, warmup=0.0):
    at = Schedule(part.build("schedule", ref), warmup=warmup).at
    return np.array([at(Clock(s, steps)) for s in range(steps)])


def table(c, d, norms, warmup=0.0):
    rows = [(lr, 100, t, i) for lr in (0.01, 0.03) for i in (1, 2, 3) for t in (15, 30, 50, 75, 90, 100)]
    loss = [c + theorem(lr * shape(REFS[i - 1], steps, warmup)[:t], norms[:t], d) for lr, steps, t, i in rows]
    lr, steps, step, schedule = (np.array(v, float) for v in zip(*rows, strict=True))
    return {"lr": lr, "steps": steps, "step": step, "schedule": schedule, "loss": np.array(loss)}


def test_contract():
    check_part("law/schedule-bound")


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_prediction_is_the_theorem(warmup):
    x = table(2.0, 0.7, np.full(100, 1.3), warmup)
    got = law(schedules=REFS, warmup=warmup).predict(np.array([2.0, 0.7, 1.3]), x)
    np.testing.assert_allclose(got, x["loss"], rtol=1e-12)


def test_prediction_with_a_profile():
    t = np.arange(1, 101)
    norms = 3.0 * np.exp(-0.05 * t) + 0.8 * t**0.2 + 0.4
    x = table(2.0, 0.7, norms)
    got = law(schedules=REFS, profile="decaying").predict(np.array([2.0, 0.7, 0.4, 3.0, 0.05, 0.8, 0.2]), x)
    np.testing.assert_allclose(got, x["loss"], rtol=1e-12)


def test_pooling_of_late_steps_is_close():
    steps, d = 3000, 0.7
    t = np.arange(1, steps + 1)
    norms = 3.0 * np.exp(-0.003 * t) + 8.0 * t**-0.4 + 0.4
    x = {"lr": np.array([0.02]), "steps": np.array([3000.0]), "step": np.array([3000.0]), "schedule": np.array([2.0])}
    got = law(schedules=REFS, profile="decaying").predict(np.array([2.0, d, 0.4, 3.0, 0.003, 8.0, -0.4]), x)
    assert got[0] == pytest.approx(2.0 + theorem(0.02 * shape(REFS[1], steps), norms, d), rel=1e-3)


def test_known_parameters_are_recovered():
    x = table(2.0, 0.7, np.full(100, 1.3))
    assert laws.fit(law(schedules=REFS), x, bootstrap=0).values == pytest.approx([2.0, 0.7, 1.3], rel=1e-4)


def test_a_schedule_left_out_is_predicted():
    rng = np.random.default_rng(0)
    x = table(2.0, 0.7, np.full(100, 1.3))
    x["loss"] = x["loss"] * np.exp(0.002 * rng.standard_normal(len(x["loss"])))
    found = laws.fit(law(schedules=REFS), x, bootstrap=0, holdout="schedule>2")
    assert found.held_out["mean_relative_error"] < 0.005


def test_best_learning_rates():
    found = law(schedules=REFS).optimal(np.array([2.0, 0.7, 1.3]), 100)
    assert list(found)[2] == "2 wsd lr"
    at = found["2 wsd lr"]
    losses = [2.0 + theorem(f * at * shape(REFS[1], 100), 1.3, 0.7) for f in (0.98, 1.0, 1.02)]
    assert losses[0] > losses[1] < losses[2]
    assert found["2 wsd loss"] == pytest.approx(losses[1])


def test_published_final_losses():
    """124M, 50k steps, six cooldowns by three learning rates: one C, D and G for all."""
    refs = tuple({"wsd": {"decay": c, "shape": "linear"}} for c in PUBLISHED)
    rows = [(lr, i, y) for i, c in enumerate(PUBLISHED, 1) for lr, y in zip((5e-4, 1e-3, 2e-3), PUBLISHED[c], strict=True)]
    lr, schedule, loss = (np.array(v, float) for v in zip(*rows, strict=True))
    full = np.full(18, 5000.0)
    found = laws.fit(
        law(schedules=refs), {"lr": lr, "steps": full, "step": full, "schedule": schedule, "loss": loss}, bootstrap=0
    )
    off = np.abs(np.array(found.predicted) - loss)
    assert off.mean() < 0.007
    assert off[3:].max() < 0.012  # cooldowns of 10 % end higher than the bound says
    best = law(schedules=refs).optimal(found.theta, 5000)
    assert 0.7e-3 < best["2 wsd lr"] < 1.2e-3 < best["6 wsd lr"] < 2.2e-3


def test_refusals():
    x = {"lr": np.array([0.1]), "steps": np.array([10.0]), "step": np.array([5.0]), "schedule": np.array([3.0])}
    with pytest.raises(UsageError, match="there are 2 schedules"):
        law(schedules=("constant", "linear")).predict(np.array([1.0, 1.0, 1.0]), x)
    with pytest.raises(UsageError, match="schedule"):
        law(schedules=("constnat",))
