"""Oracle of schedule/power: the card's formula in float64, the authors' factor(step), worked points of the paper.

Bugs it is meant to catch: steps instead of tokens, the batch in tokens, the cap applied before the batch, a decay that
starts from the value at its own tokens instead of where it began, a token counter shifted by warmup or restarted.
"""

import math

import numpy as np
import pytest

from metier.core import part
from metier.core.clock import Clock
from metier.core.errors import UsageError
from metier.core.schedule import Schedule
from metier.testing import check_part


def lr(steps, tps, *, warmup=0.0, at=None, eta_max=0.02, **options):
    """Learning rates of a run whose optimizer has lr = eta_max."""
    schedule = Schedule(part.build("schedule", {"power": {"eta_max": eta_max, **options}}), warmup=warmup)
    where = range(steps + 1) if at is None else at
    return eta_max * np.array([schedule.at(Clock(s, steps, s * tps, tps)) for s in where])


def formula(steps, tps, warm, decay, a=4.0, b=-0.51, eta_max=0.02):
    """The three stages in tokens."""
    beta, total = tps / 4096, steps * tps
    n_warm, n_decay = warm * tps, decay * (steps - warm) * tps

    def power(n):
        return min(eta_max, beta * a * n**b) if n else eta_max

    out = []
    for s in range(steps + 1):
        n = s * tps
        if s < warm:
            out.append((n + tps) / n_warm * power(n_warm))  # the update of step s has seen s + 1 steps of tokens
        elif n <= total - n_decay:
            out.append(power(n))
        else:
            x = (n - (total - n_decay)) / n_decay
            out.append((math.exp(1 - x) - 1) / (math.e - 1) * power(total - n_decay))
    return np.array(out)


def test_contract():
    check_part("schedule/power")


@pytest.mark.parametrize(("tps", "warm"), [(4096, 0), (4096, 20), (65536, 10), (1000, 7)])
@pytest.mark.parametrize("decay", [0.1, 0.25])
def test_formula(tps, warm, decay):
    np.testing.assert_allclose(lr(400, tps, warmup=warm, decay=decay), formula(400, tps, warm, decay), rtol=1e-12, atol=1e-18)


def test_as_the_authors_engine_after_warmup():
    """Their factor(step) = min(1, (A / lr) (step C)^b) with A = beta a and C tokens per step."""
    tps, steps, a = 131072, 3000, 4.0
    theirs = [min(1.0, (tps / 4096 * a / 0.02) * (s * tps) ** -0.51) for s in range(50, 2700)]
    np.testing.assert_allclose(lr(steps, tps, warmup=50, decay=0.0, at=range(50, 2700)) / 0.02, theirs, rtol=1e-12)


def test_continuous_at_both_joins_and_zero_at_the_end():
    got = lr(1000, 65536, warmup=100, decay=0.1)
    assert got[99] == pytest.approx(got[100], rel=1e-12)  # the warmup reaches what follows it
    assert abs(got[911] - got[910]) < 0.02 * got[910]
    assert got[910] == pytest.approx(16 * 4 * (910 * 65536) ** -0.51)  # the decay is of the 900 steps after warmup
    assert got[1000] == 0.0


def test_power_in_tokens_and_linear_in_batch():
    many = lr(4000, 4096, eta_max=1e6, decay=0.0)
    assert many[2000] / many[500] == pytest.approx(4**-0.51, rel=1e-12)
    assert many[2000] / many[500] == pytest.approx(0.4931, abs=5e-5)
    double = lr(4000, 8192, eta_max=1e6, decay=0.0)
    assert double[1000] == pytest.approx(2 * many[2000], rel=1e-12)  # the same tokens


def test_half_the_batch_and_twice_the_steps_halves_the_rate_at_the_same_tokens():
    large, small = lr(500, 262144, decay=0.0), lr(1000, 131072, decay=0.0)
    capped = large >= 0.02
    assert not capped.all()
    np.testing.assert_allclose(small[::2][~capped], large[~capped] / 2, rtol=1e-12)


def test_runs_of_different_lengths_share_everything_before_the_shorter_one_decays():
    np.testing.assert_array_equal(lr(500, 65536, warmup=20)[:452], lr(5000, 65536, warmup=20)[:452])


@pytest.mark.parametrize(("beta", "tokens"), [(1, 3.3e4), (128, 4.4e8), (1024, 2.6e10)])
def test_where_the_cap_is_left(beta, tokens):
    schedule = part.build("schedule", {"power": {"decay": 0.0}}).obj
    at = [schedule(Clock(1, 10, round(tokens * f), beta * 4096.0)) for f in (0.97, 1.04)]
    assert at[0] == 1.0
    assert at[1] < 1.0


def test_the_papers_number_for_a_long_run():
    """batch 1024, 1e13 tokens, a = 4.6: 0.0011, 'too small for the start'."""
    schedule = part.build("schedule", {"power": {"a": 4.6, "decay": 0.0}}).obj
    assert 0.02 * schedule(Clock(1, 10, 10**13, 1024 * 4096.0)) == pytest.approx(0.0011, abs=5e-5)


def test_the_first_update_is_at_the_cap():
    assert lr(100, 4096)[0] == 0.02


def test_real_tokens_count_not_steps():
    schedule = part.build("schedule", {"power": {"decay": 0.0}}).obj
    assert schedule(Clock(500, 1000, 10**6, 4096.0)) == schedule(Clock(100, 1000, 10**6, 4096.0)) < 1


def test_unknown_tokens_are_an_error():
    with pytest.raises(UsageError, match="how many tokens a step has"):
        part.build("schedule", "power").obj(Clock(3, 10))
    with pytest.raises(UsageError, match="b = 0.5"):
        part.build("schedule", {"power": {"b": 0.5}})
