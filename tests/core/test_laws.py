"""The fitting machinery on laws whose solution is known in closed form."""

import json

import numpy as np
import pytest

from metier.core import laws
from metier.core.errors import UsageError


class Power:
    """``y = c x^p``: ordinary least squares in logarithms when the Huber width is large."""

    names = ("c", "p")
    bounds = {"c": (1e-9, 1e9), "p": (-5.0, 5.0)}
    inputs = ("x",)
    output = "y"

    def start(self, x, y):
        return [[1.0, 0.0], [1.0, 3.0]]

    def predict(self, theta, x):
        return theta[0] * x["x"] ** theta[1]


def table(n=40, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    x = np.exp(rng.uniform(0, 5, n))
    return {"x": x, "y": 3 * x**-0.7 * np.exp(noise * rng.standard_normal(n))}


def test_wide_huber_is_least_squares():
    t = table()
    slope, intercept = np.polyfit(np.log(t["x"]), np.log(t["y"]), 1)
    found = laws.fit(Power(), t, bootstrap=0, delta=100.0)
    np.testing.assert_allclose(found.values, [np.exp(intercept), slope], rtol=1e-6)


def test_narrow_huber_is_least_absolute_error():
    t = table(n=15)
    found = laws.fit(Power(), t, bootstrap=0, delta=1e-6)
    lx, ly = np.log(t["x"]), np.log(t["y"])
    # A least-absolute line passes through two of the points.
    lines = [(i, (ly[j] - ly[i]) / (lx[j] - lx[i])) for i in range(15) for j in range(i)]
    best = min((np.abs(ly - ly[i] - slope * (lx - lx[i])).sum(), slope) for i, slope in lines)
    assert np.abs(found.residuals).sum() == pytest.approx(best[0], rel=1e-3)
    assert found.values[1] == pytest.approx(best[1], rel=1e-2)


def test_huber_by_hand():
    np.testing.assert_allclose(laws.huber(np.array([0.5, -1, 3]), 1.0), [0.125, 0.5, 2.5])


def test_intervals_cover_as_the_normal_theory_says():
    t = table(n=60)
    found = laws.fit(Power(), t, bootstrap=200, delta=100.0)
    lx, r = np.log(t["x"]), np.array(found.residuals)
    error = np.sqrt((r @ r) / 58 / ((lx - lx.mean()) ** 2).sum())
    assert found.high[1] - found.low[1] == pytest.approx(2 * 1.96 * error, rel=0.3)
    assert found.low[1] < found.values[1] < found.high[1]


def test_same_seed_same_intervals():
    a, b, c = (laws.fit(Power(), table(), bootstrap=20, seed=s) for s in (1, 1, 2))
    assert a == b
    assert a.low != c.low


def test_held_out_rows_are_predicted_without_being_seen():
    t = table(noise=0.0)
    t["y"] = np.where(t["x"] > 50, t["y"] * 2, t["y"])
    found = laws.fit(Power(), t, bootstrap=0, holdout="x>50").held_out
    assert found["rows"] == int((t["x"] > 50).sum())
    np.testing.assert_allclose(found["predicted"], np.array(found["observed"]) / 2, rtol=1e-6)
    assert found["bias"] == pytest.approx(-0.5)


def test_a_share_holds_out_the_largest():
    t = table(n=50)
    out = laws.held_out_rows(Power(), t, 0.2)
    assert out.sum() == 10
    assert t["x"][out].min() > t["x"][~out].max()


@pytest.mark.parametrize("holdout", ["y~3", "0", "1.5", "x>1e9", "z>1"])
def test_senseless_holdouts_are_refused(holdout):
    with pytest.raises(UsageError):
        laws.held_out_rows(Power(), table(), holdout)


def test_undetermined_parameters_are_named():
    t = table()
    found = laws.fit(Power(), {"x": t["x"], "y": 3 * t["x"] ** -9.0}, bootstrap=0)
    assert "p" in found.at_bound


def test_tables(tmp_path):
    csv = tmp_path / "t.csv"
    csv.write_text("name,params,y\na,1e9,2.5\nb,2e9,2.25\n")
    found = laws.read_table(csv, {"x": "params"})
    assert found["x"].tolist() == [1e9, 2e9]
    assert "name" not in found
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"x": 1, "y": 2}\n\n{"x": 3, "y": 4}\n')
    assert laws.read_table(lines)["y"].tolist() == [2, 4]
    with pytest.raises(UsageError, match="Did you mean 'params'"):
        laws.read_table(csv, {"x": "param"})
    with pytest.raises(UsageError, match="neither"):
        laws.read_table(
            tmp_path.joinpath("t.txt").absolute().with_suffix(".txt") if (tmp_path / "t.txt").write_text("x") else csv
        )
    with pytest.raises(UsageError, match="cannot read"):
        laws.read_table(tmp_path / "none.csv")


def test_bad_rows_are_refused():
    t = table()
    with pytest.raises(UsageError, match="row 3"):
        laws.fit(Power(), {**t, "y": np.where(np.arange(40) == 2, -1, t["y"])})
    with pytest.raises(UsageError, match="'y'"):
        laws.fit(Power(), {"x": t["x"]})
    with pytest.raises(UsageError, match="2 rows"):
        laws.fit(Power(), {n: v[:2] for n, v in t.items()})


def test_json_and_plot():
    found = laws.fit(Power(), table(), bootstrap=0, holdout=0.2)
    json.dumps(found.to_dict())
    import xml.etree.ElementTree as xml

    tree = xml.fromstring(laws.plot(found, title="a < b & c"))
    assert len([e for e in tree.iter() if e.tag.endswith("circle")]) == 40 + found.held_out["rows"]
