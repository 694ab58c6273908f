"""Oracle of probe/gradient-coefficients: the closed forms of the paper's five losses, and of some more, on the grid.

Bugs it is meant to catch: a sign, chosen and rejected exchanged, per-token for per-answer slopes, one grid for both ends,
a state or a step shared between cells, the run's own pairs scored without their reference.
"""

import math

import numpy as np
import pytest

from metier.core import part
from metier.core.batch import Pairs
from metier.core.errors import UsageError
from metier.core.probing import Probe
from metier.testing import check_part
from metier.testing.probe import tiny_probe


def measure(objective, **options):
    return part.build("probe", {"gradient-coefficients": {"objective": objective, **options}}).obj(tiny_probe(1))


def columns(found):
    return (np.array([cell[k] for cell in found["table"]]) for k in ("chosen", "rejected", "c_plus", "c_minus"))


def test_contract():
    check_part("probe/gradient-coefficients")


def sig(x):
    return 1 / (1 + np.exp(-x))


N = 10
FORMS = {
    "mle": ({"exmate": {"lam": 0.0}}, lambda w, r: (1 / N + 0 * w, 0 * r)),
    "unlikelihood": ({"unlikelihood": {"alpha": 0.5}}, lambda w, r: (1 / N + 0 * w, 0.5 / N * np.exp(r) / (1 - np.exp(r)))),
    "exmate": ({"exmate": {"lam": 0.5}}, lambda w, r: (1 / N + 0 * w, 0.5 / N * np.exp(r))),
    "dpo": ({"dpo": {"beta": 0.2}}, lambda w, r: (0.2 * sig(-0.2 * N * (w - r)),) * 2),
    "simper": ("simper", lambda w, r: (np.exp(w) / N, np.exp(r) / N)),
    "ld-dpo": ({"ld-dpo": {"beta": 0.2, "alpha": 0.1}}, lambda w, r: (0.2 * sig(-0.2 * N * (w - r)),) * 2),
    "aot": ({"aot": {"beta": 0.2}}, lambda w, r: (0.2 * sig(-0.2 * N * (w - r)),) * 2),
    "alpha-dpo": ({"alpha-dpo": {"beta": 2.0}}, lambda w, r: (2 / N * sig(-2 * (w - r - 0.6)),) * 2),
    "xpo": ({"xpo": {"beta": 0.2}}, lambda w, r: (0.2 * sig(-0.2 * N * (w - r)),) * 2),
}


@pytest.mark.parametrize("name", FORMS)
def test_closed_forms(name):
    objective, form = FORMS[name]
    w, r, plus, minus = columns(measure(objective, length=N, points=7))
    expected = form(w, r)
    np.testing.assert_allclose(plus, expected[0], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(minus, expected[1], rtol=1e-6, atol=1e-12)


def test_grid():
    found = measure("dpo", points=3, nearest=0.1, farthest=10.0)
    assert len(found["table"]) == 9
    assert (
        {round(c["chosen"], 9) for c in found["table"]}
        == {round(c["rejected"], 9) for c in found["table"]}
        == {-10.0, -1.0, -0.1}
    )
    assert all(c["ratio"] == pytest.approx(1.0) for c in found["table"])


def test_the_start_of_training():
    start = measure({"dpo": {"beta": 0.3}})["at_reference"]
    assert start["c_plus"] == start["c_minus"] == pytest.approx(0.15)
    assert start["chosen"] == -1.0
    assert measure({"exmate": {"lam": 0.5}}, reference=-2.0)["at_reference"]["c_minus"] == pytest.approx(0.05 * math.exp(-2))


BOUNDED = {
    "dpo": (True, True),
    "exmate": (True, True),
    "simper": (True, True),
    "unlikelihood": (True, False),
    "ipo": (False, False),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_boundedness(name):
    found = measure(name)
    assert tuple(found["bounded"].values()) == BOUNDED[name]


def test_signs():
    assert measure("dpo")["never_negative"] == {"c_plus": True, "c_minus": True}
    assert measure("apo-down")["never_negative"]["c_plus"] is False
    assert measure("ipo")["never_negative"] == {"c_plus": False, "c_minus": False}


def test_what_has_no_rejected_side_has_no_ratio_of_growth():
    found = measure({"exmate": {"lam": 0.0}})
    assert found["growth"]["c_minus"] is None
    assert found["bounded"]["c_minus"] is True


def test_other_objectives_and_options_are_refused():
    with pytest.raises(UsageError, match="classify"):
        measure("classify")
    with pytest.raises(UsageError, match="nearest"):
        measure("dpo", nearest=2.0, farthest=1.0)
    with pytest.raises(UsageError, match="dpo"):
        measure("dop")


class Scored:
    """A module of a run that reads pairs, whose scores are known."""

    def __init__(self, needs, batch):
        self.needs, self.batch = needs, batch

    def score(self, layout):
        return self.batch


def test_on_the_pairs_of_the_run():
    import torch

    t = lambda *v: torch.tensor(v)
    batch = Pairs(t(-5.0, -9.0), t(-6.0, -2.0), t(3.0, 4.0), t(2.0, 5.0), t(-5.0, -6.0), t(-5.0, -4.0))
    plain = tiny_probe(1)
    f = part.build("probe", {"gradient-coefficients": {"objective": {"dpo": {"beta": 1.0}}}}).obj
    probe = Probe(plain.bundle, Scored(frozenset({"reference"}), batch), Pairs, plain.layouts, plain.engine)
    h = np.array([0.0 + 1.0, -3.0 - 2.0])
    assert f(probe)["data"] == pytest.approx(
        {"pairs": 2, "c_plus": sig(-h).mean(), "c_minus": sig(-h).mean(), "ratio": 1.0, "negative_c_plus": 0.0}
    )
    assert f(Probe(plain.bundle, Scored(frozenset(), batch), Pairs, plain.layouts, plain.engine))["data"] is None
    assert f(plain)["data"] is None
    assert batch.chosen_logps.grad is None
