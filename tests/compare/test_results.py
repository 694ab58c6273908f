"""Results survive JSON exactly, and refuse what cannot be a result."""

import json
import math

import fakes
import pytest
from pydantic import ValidationError

from metier.compare.results import ComparisonResult, Curve, RunResult, Tuning


def through_json(result):
    return type(result).model_validate_json(json.dumps(result.model_dump(mode="json"), allow_nan=False))


def same(a, b):
    """Equality that takes NaN for equal to NaN."""
    return repr(a) == repr(b)


def test_a_comparison_survives_json():
    result = fakes.demo()
    assert same(through_json(result), result)
    assert same(ComparisonResult.model_validate_json(result.model_dump_json()), result)


def test_what_is_not_finite_in_a_curve_becomes_null_then_nan():
    curve = Curve(step=[1, 2, 3, 4], tokens=[1, 2, 3, 4], seconds=[0.1, 0.2, 0.3, 0.4],
                  value=[1.5, math.nan, math.inf, -math.inf])  # fmt: skip
    dumped = curve.model_dump(mode="json")
    assert dumped["value"] == [1.5, None, None, None]
    back = through_json(curve)
    assert back.value[0] == 1.5
    assert all(math.isnan(v) for v in back.value[1:])
    assert back.step == [1, 2, 3, 4]
    assert back.seconds == [0.1, 0.2, 0.3, 0.4]


def test_floats_keep_every_digit():
    run = fakes.run("a", 0, 0.1 + 0.2)
    assert through_json(run).metric == 0.1 + 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_is_finite_or_none(value):
    run = fakes.run("a", 0, 2.0).model_copy(update={"metric": value})
    run = RunResult(**dict(run))
    assert run.metric is None
    assert run.failed


def test_failed_runs_are_known_by_status_or_missing_metric():
    assert not fakes.run("a", 0, 2.0).failed
    assert fakes.run("a", 0, None).failed
    assert fakes.run("a", 0, 2.0, status="crashed").failed


def test_curves_and_tuning_refuse_unequal_lengths():
    with pytest.raises(ValidationError, match="lengths"):
        Curve(step=[1, 2], tokens=[1, 2], seconds=[1, 2], value=[1])
    with pytest.raises(ValidationError, match="2 values but 1"):
        Tuning(arm="a", parameter="lr", values=[1, 2], metric=[None], best=1)


def test_exactly_one_control_and_no_unknown_fields():
    result = fakes.comparison({"a": [1.0], "b": [2.0]}, control="b")
    assert result.control.name == "b"
    assert [a.name for a in result.challengers] == ["a"]
    with pytest.raises(ValidationError, match="exactly one arm is the control"):
        fakes.comparison({"a": [1.0], "b": [2.0]}, control="c")
    with pytest.raises(ValidationError):
        ComparisonResult(**{**result.model_dump(), "verdict": "holds"})


@pytest.mark.parametrize(
    ("values", "best", "edge"),
    [([1, 2, 3], 2, False), ([1, 2, 3], 3, True), ([3, 1, 2], 1, True), ([5], 5, False)],
)
def test_the_best_at_an_edge_is_known(values, best, edge):
    assert Tuning(arm="a", parameter="lr", values=values, metric=[None] * len(values), best=best).at_edge is edge


def test_final_runs_come_in_the_order_of_the_seeds_without_trials():
    runs = [fakes.run("a", 1000, 9.0, trial=0), fakes.run("a", 1, 1.1), fakes.run("a", 0, 1.0)]
    result = fakes.comparison({"a": [1.0, 1.1], "b": [2.0, 2.0]}, control="b")
    result = result.model_copy(update={"runs": runs})
    assert [r.metric for r in result.finals("a")] == [1.0, 1.1]
