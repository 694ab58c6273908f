"""Oracle of law/power-lr: the published constants, a grid of runs with a known minimum, the paper's worked point."""

import numpy as np
import pytest

from metier.core import laws, part
from metier.core.errors import UsageError
from metier.testing import check_part


@pytest.fixture
def grid():
    t, beta = np.meshgrid(2.0 ** np.arange(1, 9) * 1e9, 2.0 ** np.arange(4, 10))
    return {"T": t.ravel(), "beta": beta.ravel()}


def law(**options):
    return part.build("law", {"power-lr": options}).obj


def test_contract():
    check_part("law/power-lr")


@pytest.mark.parametrize(("a", "b"), [(4.6, -0.51), (4.34, -0.507), (4.86, -0.513), (4.46, -0.508)])
def test_published_fits_are_recovered(grid, a, b):
    lr = grid["beta"] * a * grid["T"] ** b
    assert laws.fit(law(), {**grid, "lr": lr}, bootstrap=0).values == pytest.approx([a, b], rel=1e-5)
    assert laws.fit(law(batch="free"), {**grid, "lr": lr}, bootstrap=0).values == pytest.approx([a, b, 1.0], rel=1e-5)


def test_a_batch_exponent_other_than_one_is_seen(grid):
    rng = np.random.default_rng(0)
    lr = 3.0 * grid["T"] ** -0.4 * grid["beta"] ** 0.6 * np.exp(0.05 * rng.standard_normal(48))
    found = laws.fit(law(batch="free"), {**grid, "lr": lr}, bootstrap=40)
    assert found.low[2] < 0.6 < found.high[2] < 0.7


def test_worked_point():
    """batch 1024 and 1e13 tokens: 0.0011."""
    got = law().predict(np.array([4.6, -0.51]), {"T": np.array([1e13]), "beta": np.array([1024.0])})
    assert got[0] == pytest.approx(0.0011, abs=5e-5)
    assert law().optimal(np.array([4.6, -0.51]), 1e13) == {"lr / beta": pytest.approx(got[0] / 1024)}


def test_minimum_of_a_parabola():
    lrs = 2.0 ** np.arange(-10, -4)
    losses = 2 + 0.3 * np.log(lrs / 0.0123) ** 2
    assert law().best_lr(lrs[::-1], losses[::-1]) == (pytest.approx(0.0123), pytest.approx(2.0))
    assert law().best_lr(lrs, np.array([1.0, 2, 3, 4, 5, 6]))[0] == pytest.approx(lrs[0])
    assert law().best_lr(lrs, np.array([3.0, 1.0, 2.0, np.nan, np.inf, np.nan]))[0] < lrs[2]
    with pytest.raises(UsageError, match="at least 3"):
        law().best_lr(lrs[:2], losses[:2])


def test_optima_keep_the_best_batches_of_every_length():
    rows = {"T": [], "beta": [], "lr": [], "loss": []}
    for t in (1e6, 4e6):
        for beta in (1.0, 2.0, 4.0, 8.0):
            best = beta * 4.6 * t**-0.51
            for f in (0.25, 0.5, 1.0, 2.0, 4.0):
                values = (t, beta, best * f * 1.1, 1 + beta / 100 + np.log(f * 1.1) ** 2)
                for name, v in zip(rows, values, strict=True):
                    rows[name].append(v)
    found = law().optima({n: np.array(v) for n, v in rows.items()})
    assert sorted(set(found["beta"])) == [1.0, 2.0, 4.0]
    assert laws.fit(law(), found, bootstrap=0).values == pytest.approx([4.6, -0.51], rel=1e-4)
