import json

import pytest

from metier.cli import main


@pytest.fixture
def run(tmp_path):
    lines = [json.dumps({"text": f"document {i} says hello to number {i * i}"}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.yaml").write_text(
        f"model: lab/llama-50k\ndata: {{train: {tmp_path}/data.jsonl, eval_fraction: 0.2, max_length: 32}}\n"
        "optimizer: {l3rs: {lr: 0.1}}\ntrain: {steps: 2, batch: 4}\n"
    )
    return tmp_path / "run.yaml"


def call(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        main([*map(str, argv)])
    out = capsys.readouterr()
    return e.value.code, out.out, out.err


def test_learn_continue_and_use(run, capsys):
    out = run.parent / "c.safetensors"
    code, text, err = call(capsys, "meta", run, "--out", out, "--iterations", 1, "--pairs", 1, "--sigma", 0.2)
    assert code == 0, err
    assert "learned from 2 runs" in text
    code, text, err = call(capsys, "meta", run, "--out", out, "--iterations", 2, "--pairs", 1, "--sigma", 0.2, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["runs"] == 4
    assert [h["iteration"] for h in found["history"]] == [1, 2]
    code, _, err = call(capsys, "train", run, f"optimizer.l3rs.controller={out}", "--out", run.parent / "used", "--quiet")
    assert code == 0, err


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--sigma", "0"], "sigma = 0.0"), (["optimizer=adamw"], "no file to learn"), (["optimizer.l3rs.embed=3"], "embed_dim")],
)
def test_usage_errors(run, capsys, more, message):
    code, _, err = call(capsys, "meta", run, "--out", run.parent / "c.safetensors", *more)
    assert code == 2
    assert message in err
