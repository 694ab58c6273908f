"""Oracle of core/divergence: each rule on a curve where it alone applies, one step to either side of its bound.

Bugs it is meant to catch: the running minimum of the raw losses, steps above it that are not in a row, an uncorrected
average at the start, shares rounded down to nothing, state lost by a resume.
"""

import math

import numpy as np
import pytest

from metier.core.divergence import Divergence, diverged


def smoothed(losses):
    """Corrected exponential averages, straight from the definition."""
    found = []
    for t in range(1, len(losses) + 1):
        weights = 0.9 ** np.arange(t)[::-1]
        found.append(float((weights * losses[:t]).sum() / weights.sum()))
    return found


def expected(losses, steps):
    """The rules, slowly."""
    run, averages = 0, smoothed(losses)
    for t, (loss, s) in enumerate(zip(losses, averages, strict=True), 1):
        if not math.isfinite(loss):
            return t
        run = run + 1 if s > 1.5 * min(averages[:t]) > 0 else 0
        if run >= math.ceil(0.05 * steps):
            return t
        if t == steps and s > averages[max(1, round(0.1 * steps)) - 1]:
            return t
    return None


def first(losses, steps):
    watch = Divergence(steps)
    return next((t for t, x in enumerate(losses, 1) if watch.update(x)), None)


def test_falling_and_flat_curves_have_not_diverged():
    assert not diverged(np.linspace(8, 3, 100), 100)
    assert not diverged([4.0] * 100, 100)
    assert not diverged(np.linspace(8, 3, 50), 100)  # not over yet


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad):
    losses = [5.0, 4.0, bad, 3.0]
    assert first(losses, 100) == 3
    assert "step 3" in diverged(losses, 100)


def test_the_end_above_the_beginning():
    down_and_up = [*np.linspace(8, 6, 20), *np.linspace(6, 8.5, 80)]
    assert max(smoothed(down_and_up)) < 1.5 * min(smoothed(down_and_up))
    assert "at the end" in diverged(down_and_up, 100)
    assert not diverged(down_and_up[:99], 100)


def test_a_short_excursion_is_no_divergence_and_a_long_one_is():
    def curve(height):
        return [4.0] * 20 + [3.0] * 60 + [height] * 3 + [3.0] * 17

    counts = {h: sum(s > 4.5 for s in smoothed(curve(h))) for h in (10.0, 14.0)}
    assert counts[10.0] < 5 <= counts[14.0]
    assert not diverged(curve(10.0), 100)
    assert "1.5 times" in diverged(curve(14.0), 100)


def test_losses_below_zero_have_no_multiple():
    assert not diverged([-1.0 - 0.001 * t for t in range(100)], 100)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("steps", [7, 40, 200])
def test_random_curves_against_the_slow_rules(seed, steps):
    rng = np.random.default_rng(seed)
    drift = rng.choice([-0.01, 0.0, 0.02])
    losses = list(np.abs(4 + np.cumsum(rng.normal(drift, 0.3, steps))) + 0.1)
    assert first(losses, steps) == expected(losses, steps)


def test_state_survives():
    rng = np.random.default_rng(3)
    losses = list(np.abs(4 + np.cumsum(rng.normal(0.02, 0.3, 100))))
    one = Divergence(100)
    for i, x in enumerate(losses):
        two = Divergence(1)
        two.load_state_dict(one.state_dict())
        assert two == one
        one = two if i % 2 else one
        one.update(x)
    assert one.reason == diverged(losses, 100)
