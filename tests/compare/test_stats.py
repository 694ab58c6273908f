"""Statistics against hand calculation, published t quantiles and plain numpy."""

import itertools
import math

import fakes
import numpy as np
import pytest

from metier.compare import stats

T975 = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216}
"""0.975 quantiles of Student's t from printed tables."""


def comparison(arm, control, **extra):
    return fakes.comparison({"arm": arm, "control": control}, control="control", **extra)


def one(arm, control, **extra):
    (found,) = stats.paired(comparison(arm, control, **extra))
    return found


def test_interval_by_hand():
    # differences −0.1, −0.2, −0.3: mean −0.2, sd 0.1, half width 4.30265 · 0.1 / √3
    p = one([1.9, 1.8, 1.7], [2.0, 2.0, 2.0])
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert p.differences == pytest.approx((-0.1, -0.2, -0.3))
    assert (p.mean, p.sd, p.n) == (pytest.approx(-0.2), pytest.approx(0.1), 3)
    assert (p.low, p.high) == (pytest.approx(-0.2 - half, abs=1e-6), pytest.approx(-0.2 + half, abs=1e-6))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10])
def test_interval_from_tables(n):
    d = np.random.default_rng(n).standard_normal(n)
    half = T975[n - 1] * d.std(ddof=1) / math.sqrt(n)
    assert stats.interval(d) == (
        pytest.approx(d.mean() - half, rel=1e-5),
        pytest.approx(d.mean() + half, rel=1e-5),
    )


def test_pairs_are_by_seed_not_by_order_of_execution():
    result = comparison([1.0, 2.0, 3.0], [1.1, 2.2, 3.3])
    result.runs.reverse()
    (p,) = stats.paired(result)
    assert p.differences == pytest.approx((-0.1, -0.2, -0.3))


def test_p_value_agrees_with_the_interval_and_a_known_case():
    # t = −0.2 / (0.1/√3) = −3.4641 with 2 degrees of freedom; for 2 df, p = 1 − |t| / √(2 + t²) exactly
    t = 0.2 / (0.1 / math.sqrt(3))
    assert stats.p_value([-0.1, -0.2, -0.3]) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    for seed in range(20):
        d = np.random.default_rng(seed).standard_normal(4) + 1
        low, high = stats.interval(d)
        assert (stats.p_value(d) < 0.05) == (low > 0 or high < 0)


def test_signflip_counts_all_assignments():
    assert stats.p_signflip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert stats.p_signflip([1.0, -1.0]) == pytest.approx(1.0)
    d = [0.3, -0.1, 0.7, 0.2]
    sums = [abs(sum(s * v for s, v in zip(signs, d, strict=True))) for signs in itertools.product([1, -1], repeat=4)]
    assert stats.p_signflip(d) == pytest.approx(np.mean([s >= abs(sum(d)) - 1e-12 for s in sums]))
    assert stats.p_signflip([]) is None
    assert stats.p_signflip([1.0] * 15) is None


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def test_holm_reaches_the_arms_in_their_order():
    result = fakes.comparison(
        {"a": [1.0, 1.12, 1.05], "b": [1.9, 2.2, 2.0], "c": [2.0, 2.1, 2.05]}, control="c"
    )  # fmt: skip
    a, b = stats.paired(result)
    assert a.p < b.p
    assert (a.p_holm, b.p_holm) == (pytest.approx(2 * a.p), pytest.approx(max(2 * a.p, b.p)))


# --- failed runs --------------------------------------------------------------------------------------------


def test_a_failed_run_counts_as_the_worst_plus_the_range():
    p = one([1.0, None], [2.0, 3.0])  # finite 1, 2, 3: worst 3, range 2, so the failed run counts as 5
    assert p.differences == pytest.approx((-1.0, 2.0))
    assert (p.failed, p.failed_control) == (1, 0)
    p = one([1.0, None], [2.0, 3.0], lower_is_better=False)  # worst 1, range 2: −1
    assert p.differences == pytest.approx((-1.0, -4.0))


def test_tuning_trials_count_for_the_worst():
    trial = fakes.run("control", 1000, 7.0, trial=0)
    assert stats.penalty(comparison([1.0, None], [2.0, 3.0], runs=[trial])) == pytest.approx(13.0)


def test_a_crashed_run_with_a_number_still_counts_as_failed():
    result = comparison([1.0, 1.0], [2.0, 3.0])
    result.runs[0] = result.runs[0].model_copy(update={"status": "crashed"})
    (p,) = stats.paired(result)
    assert p.failed == 1
    assert p.differences[0] == pytest.approx(5.0 - 2.0)


def test_a_missing_run_counts_as_failed():
    result = comparison([1.0, 1.5], [2.0, 3.0])
    result.runs = [r for r in result.runs if (r.arm, r.seed) != ("arm", 1)]
    (p,) = stats.paired(result)
    assert (p.n, p.failed) == (2, 1)
    assert p.differences[1] == pytest.approx(2.0)


def test_both_failing_on_a_seed_is_no_difference():
    assert one([None, 1.0], [None, 2.0]).differences == pytest.approx((0.0, -1.0))


def test_no_value_at_all_gives_no_number():
    p = one([None, None], [None, None])
    assert (p.n, p.mean, p.low, p.p, p.failed, p.failed_control) == (0, None, None, None, 2, 2)


def test_a_single_value_stands_in_for_the_range():
    assert stats.penalty(comparison([None], [2.0])) == 4.0
    assert stats.penalty(comparison([None], [0.0])) == 1.0
    assert stats.penalty(comparison([None], [2.0], lower_is_better=False)) == 0.0


# --- degenerate ---------------------------------------------------------------------------------------------


def test_one_seed_has_no_interval():
    p = one([1.0], [2.0])
    assert (p.mean, p.low, p.high, p.sd, p.p) == (pytest.approx(-1.0), None, None, None, None)


def test_all_zero_is_an_interval_of_zero():
    p = one([1.0, 2.0], [1.0, 2.0])
    assert (p.mean, p.low, p.high, p.p) == (0.0, 0.0, 0.0, 1.0)


def test_equal_differences_have_no_interval():
    p = one([1.1, 1.2, 1.3], [1.2, 1.3, 1.4])  # equal up to rounding of floats
    assert p.constant
    assert (p.low, p.p) == (None, None)


# --- summaries and costs ------------------------------------------------------------------------------------


def test_summary_is_over_the_finished():
    s = stats.summary(comparison([1.0, None, 3.0], [2.0, 2.0, 2.0]), "arm")
    assert (s.mean, s.finished, s.planned, s.failed) == (pytest.approx(2.0), 2, 3, 1)
    assert s.sd == pytest.approx(math.sqrt(2))


def test_costs_use_the_seeds_that_both_finished():
    result = comparison([1.0, 1.0, None], [2.0, 2.0, 2.0])
    for r, seconds in zip(result.finals("arm"), [3.0, 5.0, 0.1], strict=True):
        r.seconds, r.peak_bytes, r.state_bytes, r.tokens = seconds, 200, 10, 50
    for r, seconds in zip(result.finals("control"), [2.0, 2.0, 100.0], strict=True):
        r.seconds, r.peak_bytes, r.state_bytes, r.tokens = seconds, 100, 40, 100
    c = stats.costs(result, "arm")
    assert (c.time, c.memory, c.state, c.tokens) == (2.0, 2.0, 0.25, 0.5)


def test_costs_without_a_basis_are_none():
    c = stats.costs(comparison([None], [1.0]), "arm")
    assert (c.time, c.memory, c.flops) == (None, None, None)
    result = comparison([1.0], [1.0])
    result.finals("control")[0].state_bytes = 0
    assert stats.costs(result, "arm").state is None


def test_the_strict_mean_lets_no_failure_pass():
    made = fakes.comparison({"whole": [1.0, 3.0], "half": [1.0, None], "base": [2.0, 2.0]}, control="base")
    assert stats.strict_mean(made, "whole") == 2.0
    assert stats.strict_mean(made, "half") == math.inf
