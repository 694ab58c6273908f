import json

import pytest

from metier.cli import main
from metier.core.api import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    lines = [json.dumps({"text": f"document {i} says hello to number {i * i}"}) for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "run.yaml").write_text(
        f"model: lab/llama-50k\ndata: {{train: {folder}/data.jsonl, eval_fraction: 0.2, max_length: 64}}\n"
        "optimizer: {adamw: {lr: 1e-2}}\nhooks: [{ema: {decay: 0.5}}]\n"
        "train: {steps: 4, batch: 4, micro_batch: 2}\n"
    )
    result = train(folder / "run.yaml", out=folder / "out", quiet=True)
    return folder, result


def call(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        main(["probe", *map(str, argv)])
    out = capsys.readouterr()
    return e.value.code, out.out, out.err


def test_run_file_and_run_folder(place, capsys):
    folder, result = place
    before = {p: p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()}
    found = {}
    for what in ("run.yaml", "out"):
        code, out, err = call(capsys, "calibration", folder / what, "bins=4", "--json")
        assert code == 0, err
        found[what] = json.loads(out)
    assert found["run.yaml"]["step"] is None
    assert found["out"]["step"] == 4
    assert found["out"]["result"]["nll"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    assert found["run.yaml"]["result"]["nll"] > found["out"]["result"]["nll"]
    assert {p: p.read_bytes() for p in (folder / "out").rglob("*") if p.is_file()} == before


def test_text_and_training_data(place, capsys):
    folder, _ = place
    code, out, err = call(capsys, "gradient-noise-scale", folder / "out", "--on", "train", "--batches", 4)
    assert code == 0, err
    assert "after step 4" in out
    assert "examples_big" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["calibratoin", "run.yaml"], "Did you mean 'calibration'"),
        (["calibration", "run.yaml", "bin=3"], "Did you mean 'bins'"),
        (["calibration", "run.yaml", "bins=0"], "bins"),
        (["calibration", "run.yaml", "bins"], "key=value"),
        (["calibration", "."], "run.json"),
        (["calibration", "run.yaml", "--on", "test"], "eval"),
    ],
)
def test_usage_errors(place, capsys, argv, message):
    folder, _ = place
    code, _, err = call(capsys, argv[0], folder / argv[1], *argv[2:])
    assert code == 2
    assert message in err
