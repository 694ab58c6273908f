"""Oracle of law/critical-batch-size: the authors' step table and what their notebook prints for it, and exact identities.

Bugs it is meant to catch: squares of steps for squares of their logarithms, the overhead added instead of multiplied, the
reference batch forgotten, the wrong root for a free exponent, c and p exchanged, a target met before it is.
"""

import json

import numpy as np
import pytest

from metier.core import laws, part
from metier.core.errors import UsageError
from metier.parts.law.critical_batch_size import critical
from metier.testing import check_part

B = 2.0 ** np.arange(6, 15)
# Steps to the goals, printed in hlzhang109/critical-batch-size, plots/chinchilla.ipynb; a, b and B* as there.
TABLE = {
    85: [46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600],
    151: [96000, 49000, 24000, 12000, 7128, 4350, 2940, 2400, 2300],
    302: [196000, 90000, 46000, 23400, 13300, 7224, 4980, 3400, 2879],
    604: [311000, 166000, 81000, 37440, 21320, 11400, 7199, 4700, 3800],
    1200: [642000, 331000, 176000, 94000, 46500, 25000, 15360, 8900, 6500],
}
PRINTED = {
    85: (1293.83, 2.83426e6, 745.3), 151: (1752.42, 5.67748e6, 955.2), 302: (2095.35, 1.13833e7, 1393.7),
    604: (2459.93, 1.94497e7, 1888.5), 1200: (3897.3, 4.33811e7, 2533.4),
}  # fmt: skip


def build(**options):
    return part.build("law", {"critical-batch-size": options}).obj


@pytest.fixture(scope="module")
def published():
    rows = [(n, b, y) for n, steps in TABLE.items() for b, y in zip(B, steps, strict=True)]
    columns = dict(zip(("size", "B", "steps"), np.array(rows, dtype=float).T, strict=True))
    return build().critical(columns, reference=256)


def test_contract():
    check_part("law/critical-batch-size")


def test_published_table(published):
    for i, n in enumerate(published["size"]):
        got = [published[k][i] for k in ("a", "b", "B")]
        np.testing.assert_allclose(got, PRINTED[n], rtol=1e-3, err_msg=str(n))


def test_published_growth(published):
    law = build(level="growth")
    for factor, c in ((1, 93.20), (20, 22.9)):
        table = {"size": factor * published["size"], "B": published["B"]}
        found = laws.fit(law, table, bootstrap=0)
        assert found.values[0] == pytest.approx(c, rel=5e-3)
        assert found.values[1] == pytest.approx(0.468, rel=5e-3)
    # by hand: the regression of log B* on log N
    slope = np.polyfit(np.log(published["size"]), np.log(published["B"]), 1)[0]
    assert found.values[1] == pytest.approx(slope, rel=1e-5)
    assert law.optimal(np.array([93.2, 0.47]), 1000)["B*"] == pytest.approx(93.2 * 1000**0.47)


def test_a_free_exponent_gives_nearly_the_same(published):
    law = build(alpha="free")
    for i, n in enumerate(published["size"]):
        found = laws.fit(law, {"B": B, "steps": np.array(TABLE[n], float)}, bootstrap=0)
        assert found.values[2] == pytest.approx(1, abs=0.1)
        assert law.optimal(found.theta, 256)["B*"] == pytest.approx(published["B"][i], rel=0.25)


def test_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, ref, o = np.exp(rng.uniform([0, 5, 0, -3], [5, 15, 5, 1]))
        for alpha in (1.0, 0.6, 0.95, 1.3):
            got = critical(a, b, ref, overhead=o, alpha=alpha)
            assert got > ref
            assert (a + b / got**alpha) * got == pytest.approx((1 + o) * (a + b / ref**alpha) * ref, rel=1e-9)
        assert critical(a, b, ref) == pytest.approx(b / (5 * a) + 1.2 * ref)
        assert critical(a, b, ref, overhead=0.2) == critical(a, b, ref)
        assert critical(7 * a, 7 * b, ref, overhead=o) == pytest.approx(critical(a, b, ref, overhead=o)), "unit of steps"
        assert critical(a, 3 * b, 3 * ref, overhead=o) == pytest.approx(3 * critical(a, b, ref, overhead=o)), "unit of B"


def test_limits():
    assert critical(0.0, 5.0, 256) == np.inf
    assert critical(3.0, 0.0, 256) == pytest.approx(1.2 * 256)
    assert critical(0.0, 5.0, 256, alpha=1.2) == np.inf
    assert critical(0.0, 5.0, 256, alpha=0.5) == pytest.approx(256 * 1.2**2)
    assert critical(3.0, 0.0, 256, alpha=0.7) == pytest.approx(1.2 * 256)


def test_optimum_prints_the_steps_there():
    got = build(overhead=0.5).optimal(np.array([10.0, 1000.0]), 8)
    assert got == pytest.approx({"B*": 0.5 * 100 + 1.5 * 8, "steps": 10 + 1000 / 62})


def test_reached():
    reached = build().reached
    steps, losses = np.array([10, 20, 30, 40]), np.array([5.0, 4.0, 3.0, 3.5])
    assert reached(steps, losses, 3.2) == 30
    assert reached(steps, losses, 3.0) == np.inf, "below, not equal"
    assert reached(steps, losses, 6.0) == 10
    assert reached(steps, losses, 3.25, between=True) == pytest.approx(27.5)
    assert reached(steps, losses, 6.0, between=True) == 10


def test_critical_needs_the_curve():
    with pytest.raises(UsageError, match="curves"):
        build(level="growth").critical({"size": B, "B": B, "steps": B}, reference=256)


def test_command_line(tmp_path, capsys):
    from metier.cli.fit import fit

    table = tmp_path / "steps.csv"
    table.write_text("B,steps\n" + "\n".join(f"{b},{100 + 6400 / b}" for b in (4, 8, 16, 32, 64)), encoding="utf-8")
    fit("critical-batch-size", table, ["overhead=0.2"], None, 4, 0, 0, 8.0, None, True)
    assert json.loads(capsys.readouterr().out)["optimum"]["B*"] == pytest.approx(0.2 * 64 + 1.2 * 8, rel=1e-3)
