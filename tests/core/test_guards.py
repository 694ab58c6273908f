import math
import pickle

import pytest

from metier.core.errors import MetierError
from metier.core.guards import NonFinite, NonFiniteError

BAD = [
    (math.nan, 1.0),
    (math.inf, 1.0),
    (-math.inf, 1.0),
    (1.0, math.nan),
    (1.0, math.inf),
    (math.nan, math.inf),
]


@pytest.mark.parametrize(("loss", "norm"), BAD)
def test_stop_names_step_values_and_batch(loss, norm):
    event = NonFinite("stop", 5).check(17, loss, norm, (f"train.jsonl:{i}" for i in range(10)))
    assert event is not None
    assert (event["event"], event["kind"], event["action"], event["step"]) == (
        "guard",
        "nonfinite",
        "stop",
        17,
    )
    assert repr((event["loss"], event["grad_norm"])) == repr((loss, norm))
    assert event["ids"] == [f"train.jsonl:{i}" for i in range(8)]
    error = NonFiniteError(event)
    assert isinstance(error, MetierError)
    assert error.exit_code == 1
    for said in (
        "step 17",
        f"loss {loss:g}",
        f"gradient norm {norm:g}",
        "train.jsonl:0",
        "train.jsonl:7 and 2 more",
        "as before",
    ):
        assert said in str(error)


@pytest.mark.parametrize(("loss", "norm"), [(0.0, 0.0), (1e38, 1e300), (-3.0, 5e-324)])
def test_finite_values_pass(loss, norm):
    assert NonFinite().check(0, loss, norm, ()) is None


def test_skip_gives_up_after_so_many_in_a_row():
    guard = NonFinite("skip", 3)
    actions = [guard.check(i, math.nan, 1.0, ("a",))["action"] for i in range(5)]
    assert actions == ["skip", "skip", "skip", "stop", "stop"]
    assert "after 3 skipped in a row" in guard.check(5, math.nan, 1.0, ("a",))["text"]


def test_a_good_step_starts_the_count_again():
    guard = NonFinite("skip", 2)
    for i in range(50):
        event = guard.check(i, 1.0 if i % 3 == 2 else math.nan, 1.0, ("a",))
        assert (event is None) == (i % 3 == 2)
        assert event is None or event["action"] == "skip"


def test_the_error_crosses_processes():
    event = NonFinite().check(1, math.inf, 1.0, ())
    copy = pickle.loads(pickle.dumps(NonFiniteError(event)))
    assert copy.event == event
    assert "Batch: unknown" in str(copy)
