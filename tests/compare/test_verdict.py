"""Words follow the interval alone; identical arms stay unclear as often as the interval promises."""

import fakes
import numpy as np
import pytest

from metier.compare import stats, verdict
from metier.compare.verdict import judge


def one(arm, control, **extra):
    (found,) = judge(fakes.comparison({"new": arm, "old": control}, control="old", **extra))
    return found


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.30, -0.11, "holds"),
        (-0.30, -0.10, "direction"),  # touches the minimum: not wholly beyond it
        (-0.30, -0.01, "direction"),
        (-0.05, -0.01, "direction"),
        (-0.30, 0.0, "unclear"),
        (-0.30, 0.20, "unclear"),
        (0.0, 0.20, "unclear"),
        (0.01, 0.20, "against"),
        (None, None, "unclear"),
    ],
)
def test_every_word_in_both_directions(low, high, expected):
    assert verdict.word(low, high, lower_is_better=True, minimum_effect=0.1) == expected
    mirrored = (None, None) if low is None else (-high, -low)
    assert verdict.word(*mirrored, lower_is_better=False, minimum_effect=0.1) == expected


def test_without_a_minimum_any_clear_gain_holds():
    assert verdict.word(-0.2, -1e-6, lower_is_better=True, minimum_effect=0.0) == "holds"


def test_numbers_and_sentence():
    # differences −0.09, −0.10, −0.11: mean −0.1, half width 4.30265 · 0.01 / √3 = 0.02484
    v = one([1.91, 1.90, 1.89], [2.0, 2.0, 2.0], minimum_effect=0.05)
    assert v.word == "holds"
    assert (v.effect, v.low, v.high) == (
        pytest.approx(-0.1), pytest.approx(-0.12484, abs=1e-5), pytest.approx(-0.07516, abs=1e-5)
    )  # fmt: skip
    assert v.text == (
        "new ends with a lower eval_loss than old, by 0.100 (95 % interval 0.075 to 0.125, 3 seeds): "
        "more than the 0.05 asked for."
    )
    assert v.effect_text == "−0.100 [−0.125, −0.075]"


def test_direction_says_what_is_missing():
    v = one([1.91, 1.90, 1.89], [2.0, 2.0, 2.0], minimum_effect=0.09)
    assert v.word == "direction"
    assert "perhaps by less than the 0.09 asked for" in v.text


def test_against_says_worse_in_both_directions():
    v = one([2.11, 2.10, 2.09], [2.0, 2.0, 2.0])
    assert v.word == "against"
    assert "higher eval_loss" in v.text
    assert "worse" in v.text
    v = one([0.51, 0.50, 0.49], [0.6, 0.6, 0.6], metric="accuracy", lower_is_better=False)
    assert v.word == "against"
    assert "lower accuracy" in v.text
    v = one([0.71, 0.70, 0.69], [0.6, 0.6, 0.6], metric="accuracy", lower_is_better=False)
    assert v.word == "holds"
    assert "higher accuracy" in v.text


def test_one_seed_is_unclear_and_says_why():
    v = one([1.0], [2.0])
    assert (v.word, v.low, v.high) == ("unclear", None, None)
    assert "one seed gives no interval" in v.text
    assert "−1.00" in v.text


def test_all_zero_differences_are_unclear():
    v = one([1.0, 2.0, 1.5], [1.0, 2.0, 1.5])
    assert (v.word, v.effect) == ("unclear", 0.0)
    assert v.text == "new and old end with the same eval_loss on all 3 seeds."


def test_equal_differences_are_unclear():
    v = one([0.50, 0.75, 0.25], [0.25, 0.50, 0.0])
    assert v.word == "unclear"
    assert "without spread" in v.text


def test_a_failing_arm_does_not_win_by_its_surviving_seeds():
    clear = [1.91, 1.90, 1.89]
    assert one(clear, [2.0, 2.0, 2.0]).word == "holds"
    v = one([1.91, 1.90, None], [2.0, 2.0, 2.0])
    assert v.word == "unclear"
    assert "new failed on 1 of 3 seeds; a failed run counts as the worst." in v.text


def test_an_arm_that_always_fails_is_against_and_an_ever_failing_control_is_beaten():
    v = one([None, None, None], [2.0, 2.1, 2.05])
    assert (v.word, v.failed) == ("against", 3)
    v = one([2.0, 2.1, 2.05], [None, None, None])
    assert (v.word, v.failed_control) == ("holds", 3)
    assert "old failed on 3 of 3 seeds" in v.text


def test_nothing_finished_says_so():
    v = one([None, None], [None, None])
    assert (v.word, v.effect, v.effect_text) == ("unclear", None, "–")
    assert "no run reached a final eval_loss" in v.text
    assert "failed on 2 of 2 seeds" in v.text


def test_one_verdict_per_arm_in_order_each_by_its_own_interval():
    result = fakes.demo()
    assert [v.arm for v in judge(result)] == ["muon", "lion", "sgd-momentum"]
    assert [v.word for v in judge(result)] == ["holds", "unclear", "unclear"]


def test_holm_does_not_change_the_word():
    many = {f"a{i}": [2.0, 2.01, 2.02] for i in range(20)} | {"new": [1.90, 1.93, 1.90]}
    result = fakes.comparison({**many, "old": [2.0, 2.01, 2.02]}, control="old")
    v = next(v for v in judge(result) if v.arm == "new")
    assert v.p < 0.05 < v.p_holm
    assert v.word == "holds"


@pytest.mark.parametrize("n", [3, 5])
def test_identical_arms_are_called_different_no_oftener_than_promised(n):
    """A 95 % interval errs in 5 % of draws; 6 000 draws stay within four standard errors of it."""
    rng, draws = np.random.default_rng(n), 6000
    shared = rng.standard_normal((draws, n, 1))
    d = np.diff(shared + 0.5 * rng.standard_normal((draws, n, 2)), axis=2)[..., 0]
    words = [verdict.word(*stats.interval(x), lower_is_better=True, minimum_effect=0.0) for x in d]
    wrong = sum(w != "unclear" for w in words) / draws
    error = (0.05 * 0.95 / draws) ** 0.5
    assert abs(wrong - 0.05) < 4 * error
    assert abs(words.count("holds") - words.count("against")) < 4 * (0.05 * draws) ** 0.5


def test_identical_arms_through_the_whole_judgement():
    """As above with whole results; 300 draws of 5 % errors stay above 91 % by three standard errors."""
    rng = np.random.default_rng(7)
    template = fakes.comparison({"new": [1.0] * 4, "old": [1.0] * 4}, control="old", minimum_effect=0.01)
    unclear = 0
    for _ in range(300):
        for r in template.runs:
            r.metric = float(2.3 + 0.02 * rng.standard_normal())
        unclear += judge(template)[0].word == "unclear"
    assert unclear >= 0.91 * 300


def test_coarse_metrics_do_not_make_identical_arms_differ():
    """Accuracy in steps of 1/8 over three seeds: equal differences are common and are not certain."""
    rng = np.random.default_rng(3)
    draws = 2000
    d = (rng.integers(3, 6, (draws, 3)) - rng.integers(3, 6, (draws, 3))) / 8
    wrong = sum(verdict.word(*stats.interval(x), lower_is_better=False, minimum_effect=0.0) != "unclear" for x in d)
    assert wrong / draws < 0.05


def test_a_real_effect_is_found():
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        d = -0.1 + 0.01 * rng.standard_normal(3)
        found += verdict.word(*stats.interval(d), lower_is_better=True, minimum_effect=0.02) == "holds"
    assert found > 190
