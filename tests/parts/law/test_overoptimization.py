"""Oracle of law/overoptimization: tables from known constants, the peak by brute force, runs read from their logs.

Bugs it is meant to catch: KL in the place of its root, log to another base, a and b exchanged, the peak without its -1, rewards
below zero refused or clipped, an offset that leaks into a.
"""

import json
import math

import numpy as np
import pytest

from metier.cli import main
from metier.core import laws, part
from metier.core.errors import UsageError
from metier.testing import check_part

KL = np.linspace(0.02, 9.0, 60) ** 2
"""d from 0.02 to 9."""


def law(**options):
    return part.build("law", {"overoptimization": options}).obj


def curve(a, b, kl=KL, rest=0.0):
    return np.array([rest + math.sqrt(k) * (a - b * math.log(math.sqrt(k))) for k in kl])


@pytest.mark.parametrize("options", [{}, {"offset": True}, {"shape": "quadratic"}, {"shape": "quadratic", "offset": True}])
def test_contract(options, monkeypatch):
    import metier.testing.law as suite
    from metier.core.part import Built

    check_part("law/overoptimization")
    monkeypatch.setattr(suite, "sample", lambda id: Built(id, None, law(**options), options))
    suite.check("law/overoptimization")


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.7), (0.3, 0.25), (2.5, 1.9), (0.05, 0.4), (0.5, -0.1)])
def test_constants_are_recovered(a, b):
    reward = curve(a, b)
    found = laws.fit(law(), {"kl": KL, "reward": reward}, bootstrap=0)
    assert found.values == pytest.approx([a, b], abs=1e-6)
    assert found.predicted == pytest.approx(reward.tolist(), abs=1e-6)
    assert law().relative(KL, reward) == pytest.approx([a, b], abs=1e-9)
    free = laws.fit(law(offset=True), {"kl": KL, "reward": curve(a, b, rest=0.4)}, bootstrap=0)
    assert free.values == pytest.approx([a, b, 0.4], abs=1e-6)


def test_rewards_below_zero_are_part_of_the_curve():
    reward = curve(0.4, 0.5)
    assert reward.min() < -1
    assert not laws.fit(law(), {"kl": KL, "reward": reward}, bootstrap=0).at_bound


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.7), (0.3, 0.25), (2.5, 1.9)])
def test_the_peak_is_the_argmax(a, b):
    kl = np.linspace(1e-4, 40.0, 400_001)
    reward = curve(a, b, kl)
    peak = law().derived(np.array([a, b]))
    assert peak["KL*"] == pytest.approx(kl[reward.argmax()], abs=2e-4)
    assert peak["R(d*)"] == pytest.approx(reward.max(), abs=1e-8)
    assert peak["d*"] == pytest.approx(math.exp(a / b - 1))
    assert law(offset=True).derived(np.array([a, b, 0.5]))["R(d*)"] == pytest.approx(reward.max() + 0.5)
    d = np.sqrt(kl)
    bent = law(shape="quadratic").derived(np.array([a, b]))
    assert bent["KL*"] == pytest.approx(kl[(a * d - b * d**2).argmax()], abs=2e-4)
    assert bent["R(d*)"] == pytest.approx((a * d - b * d**2).max(), abs=1e-8)


def test_a_rising_curve_has_no_peak():
    assert law().derived(np.array([0.5, -0.1]))["d*"] == math.inf
    assert law(shape="quadratic").derived(np.array([0.5, 0.0]))["d*"] == math.inf


def test_the_fit_is_least_squares_on_the_reward():
    rng = np.random.default_rng(0)
    reward = curve(1.0, 0.7) + 0.2 * rng.standard_normal(len(KL))
    d = np.sqrt(KL)
    expected = np.linalg.lstsq(np.stack([d, -d * np.log(d)], 1), reward, rcond=None)[0]
    found = laws.fit(law(), {"kl": KL, "reward": reward}, bootstrap=40, holdout=0.2)
    assert found.values == pytest.approx(expected, abs=1e-6)
    assert found.low[0] < 1.0 < found.high[0]
    rms = math.sqrt((reward**2).mean())
    assert found.residuals == pytest.approx(((found.predicted - reward) / rms).tolist(), abs=1e-9)
    assert found.held_out["mean_relative_error"] < 0.5
    assert "nan" not in laws.plot(found)


def test_what_cannot_be_fitted():
    with pytest.raises(UsageError, match="finite"):
        laws.fit(law(), {"kl": KL[:4], "reward": np.array([1.0, np.nan, 1, 1])})
    with pytest.raises(UsageError, match="positive"):
        laws.fit(law(), {"kl": np.array([0.0, 1, 2, 3]), "reward": np.ones(4)})


@pytest.fixture
def runs(tmp_path):
    """Two runs with a line every step, of which every second measured answers."""
    kls = np.split(KL[::3], 2)
    for name, kl in zip(("low", "high"), kls, strict=True):
        lines = [{"event": "notice", "text": "x", "time": 0}]
        for i, (k, r) in enumerate(zip(kl, curve(1.0, 0.7, kl, rest=0.3), strict=True)):
            lines += [{"event": "step", "step": 2 * i, "loss": 1.0, "time": 0}]
            lines += [{"event": "step", "step": 2 * i + 1, "loss": 1.0, "answer_kl": k, "answer_reward": r, "time": 0}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    return tmp_path


def call(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        main(["fit", "overoptimization", *map(str, argv)])
    out = capsys.readouterr()
    return e.value.code, out.out, out.err


def test_runs_are_fitted_from_their_logs(runs, capsys):
    options = ["offset=true", "kl=answer_kl", "reward=answer_reward", "--bootstrap", 0]
    code, out, _ = call(capsys, runs, *options, "--at", 4.0, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["rows"] == 20
    assert found["values"] == pytest.approx([1.0, 0.7, 0.3], abs=1e-6)
    assert found["derived"]["d*"] == pytest.approx(math.exp(1 / 0.7 - 1), rel=1e-5)
    assert found["optimum"]["reward"] == pytest.approx(0.3 + 2 * (1 - 0.7 * math.log(2)), rel=1e-5)
    code, out, _ = call(capsys, runs / "low", *options)
    assert code == 0
    assert "10 rows" in out
    assert "d* 1.535" in out


def test_runs_without_the_metrics_are_refused(runs, tmp_path_factory, capsys):
    code, _, err = call(capsys, runs, "kl=answer_kll", "reward=answer_reward")
    assert code == 2
    assert "answer_kl" in err
    code, _, err = call(capsys, tmp_path_factory.mktemp("empty"))
    assert code == 2
    assert "no runs" in err
