import json

import numpy as np
import pytest

from metier.cli import main


@pytest.fixture
def runs(tmp_path):
    n, d = (v.ravel() for v in np.meshgrid(np.logspace(7, 9, 5), np.logspace(8, 10, 5)))
    loss = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
    path = tmp_path / "runs.csv"
    path.write_text("params,D,loss\n" + "".join(f"{a},{b},{c}\n" for a, b, c in zip(n, d, loss, strict=True)))
    return path


def call(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        main(["fit", *map(str, argv)])
    out = capsys.readouterr()
    return e.value.code, out.out, out.err


def test_json(runs, capsys, tmp_path):
    svg = tmp_path / "out.svg"
    code, out, _ = call(
        capsys,
        "chinchilla",
        runs,
        "N=params",
        "--bootstrap",
        3,
        "--holdout",
        "N>=9e8",
        "--at",
        1e20,
        "--plot",
        svg,
        "--json",
    )
    found = json.loads(out)
    assert code == 0
    np.testing.assert_allclose(found["values"], [1.69, 406.4, 410.7, 0.34, 0.28], rtol=1e-4)
    assert found["held_out"]["worst_relative_error"] < 1e-3
    assert found["optimum"]["N"] * found["optimum"]["D"] * 6 == pytest.approx(1e20)
    assert svg.read_text().startswith("<svg")


def test_text(runs, capsys):
    code, out, _ = call(capsys, "chinchilla", runs, "N=params", "--bootstrap", 2, "--holdout", "0.2")
    assert code == 0
    assert "alpha" in out
    assert "held out" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["chinchila", "t.csv"], "chinchilla"), (["chinchilla", "none.csv"], "cannot read"),
     (["chinchilla", "RUNS"], "'N'"),
     (["chinchilla", "RUNS", "N=param"], "params"), (["chinchilla", "RUNS", "x=1"], "option")],
)  # fmt: skip
def test_usage_errors(runs, capsys, argv, message):
    code, _, err = call(capsys, *[runs if a == "RUNS" else a for a in argv])
    assert code == 2
    assert message in err
