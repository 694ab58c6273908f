"""``eval`` of a run says what the run itself said last; of anything else what the formula says."""

import json
import math
import random

import pytest
import torch

from metier.core import models
from metier.core.api import train
from metier.core.errors import UsageError
from metier.core.evaluate import _extended, evaluate

RUN = {
    "model": "lab/llama-50k",
    "data": {"train": "lab/pydoc", "limit": 12, "chunk": True, "max_length": 32, "eval_fraction": 0.2, "eval_limit": 4},
    "optimizer": {"adamw": {"lr": 1e-2}},
    "train": {"steps": 3, "batch": 4, "save_every": 2},
}
LORA = {"lora": {"rank": 2, "targets": "all-linear"}}
EMA = {"ema": {"decay": 0.5}}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def trained(folder, **changes):
    result = train({**RUN, **changes}, out=folder, quiet=True)
    return [e for e in result.events if e["event"] == "eval"][-1]


@pytest.mark.parametrize("changes", [{}, {"hooks": [EMA]}, {"adapter": LORA}, {"adapter": LORA, "hooks": [EMA]}])
def test_a_run_is_evaluated_as_it_ended_exactly(tmp_path, changes):
    last = trained(tmp_path / "run", **changes)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    found = evaluate(tmp_path / "run")
    assert found["loss"] == last["eval_loss"]
    assert (found["step"], found["examples"], found["tokens with loss"]) == (3, 4, 4 * 31)
    assert found["perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_the_average_is_what_is_evaluated(tmp_path):
    """EMA changes the evaluation and nothing else, so the two runs end in the same weights and differ in this."""
    plain, averaged = trained(tmp_path / "a"), trained(tmp_path / "b", hooks=[EMA])
    assert plain["eval_loss"] != averaged["eval_loss"]
    assert evaluate(tmp_path / "b", ["hooks=[]"])["loss"] == plain["eval_loss"]


def text_rows(count, seed=0):
    rng = random.Random(seed)
    words = ["print", "statement", "of", "a", "python", "module", "returns", "values", "for", "every", "object"]
    return [{"text": f"{i} " + " ".join(rng.choices(words, k=3 + 4 * (i % 3)))} for i in range(count)]


@torch.no_grad()
def reference_loss(model, tokenizer, texts):
    """Mean over all predicted tokens, one text at a time, in float64."""
    model = model.double().eval()
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]])
        logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        total -= float(logps.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count, count


def test_a_bare_model_on_a_file(tmp_path):
    rows = text_rows(7)
    bundle = models.load("lab/llama-50k")
    expected, count = reference_loss(bundle.model, bundle.tokenizer, [r["text"] for r in rows])
    found = evaluate("lab/llama-50k", data=write(tmp_path / "held.jsonl", rows))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert (found["step"], found["examples"], found["tokens with loss"]) == (None, 7, count)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_a_run_on_other_data(tmp_path):
    rows = text_rows(6)
    run = {**RUN, "data": {"train": write(tmp_path / "train.jsonl", text_rows(12, 1)), "eval_fraction": 0.2}}
    train(run, out=tmp_path / "run", quiet=True)
    tuned = models.load(str(tmp_path / "run" / "model"))
    expected, _ = reference_loss(tuned.model, tuned.tokenizer, [r["text"] for r in rows])
    found = evaluate(tmp_path / "run", data=write(tmp_path / "other.jsonl", rows))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert (found["step"], found["examples"]) == (3, 6)
    assert evaluate(tmp_path / "run", data=str(tmp_path / "other.jsonl"), limit=2)["examples"] == 2


def test_a_run_file_is_evaluated_as_it_starts(tmp_path):
    path = tmp_path / "run.yaml"
    held = write(tmp_path / "held.jsonl", text_rows(5))
    path.write_text(f"model: lab/llama-50k\ndata: {{train: {held}, eval: {held}}}\ntrain: {{steps: 2, seed: 4}}\n")
    first = evaluate(path)
    assert first["loss"] == evaluate("lab/llama-50k", ["train.seed=4"], data=held)["loss"]
    assert first["loss"] != evaluate(path, ["train.seed=5"])["loss"]


def test_wilson_interval():
    """z = 1.959964, n = 10, p = 0.8: centre (p + z²/2n)/(1 + z²/n), half-width z √(p(1-p)/n + z²/4n²)/(1 + z²/n)."""
    low, high = _extended({"loss": 1.0, "accuracy": 0.8}, "Labels", 10)["accuracy 95 %"]
    assert low == pytest.approx(0.490162, abs=1e-6)
    assert high == pytest.approx(0.943318, abs=1e-6)
    z, n, p = 1.9599639845400545, 4, 1.0
    low, high = _extended({"loss": 1.0, "accuracy": p}, "Pairs", n)["accuracy 95 %"]
    assert (low, high) == (pytest.approx(1 / (1 + z * z / n)), pytest.approx(1.0))


def test_intervals_and_perplexity_stand_only_where_they_mean_something():
    assert set(_extended({"loss": 2.0, "accuracy": 0.5}, "Tokens", 10)) == {"loss", "accuracy", "perplexity"}
    assert set(_extended({"loss": 2.0, "margin": 0.5}, "Pairs", 10)) == {"loss", "margin"}
    assert set(_extended({"loss": 2.0, "accuracy": 0.5}, "Labels", 10)) == {"loss", "accuracy", "accuracy 95 %"}
    assert math.isfinite(_extended({"loss": 1e6}, "Tokens", 1)["perplexity"])


def test_labelled_data_choose_classification(tmp_path):
    rows = [{"text": f"{i} text", "label": "yes" if i % 3 else "no"} for i in range(9)]
    found = evaluate("lab/bert-1m", data=write(tmp_path / "held.jsonl", rows))
    assert found["accuracy"] * 9 == pytest.approx(round(found["accuracy"] * 9))
    low, high = found["accuracy 95 %"]
    assert 0 <= low < high <= 1


def test_a_model_is_not_compared_with_itself(tmp_path):
    rows = [{"prompt": f"{i}", "chosen": "good", "rejected": "bad one"} for i in range(5)]
    held = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UsageError, match=r"reference=MODEL"):
        evaluate("lab/llama-50k", data=held)
    found = evaluate("lab/llama-300k", ["reference=lab/llama-50k"], data=held)
    assert found["loss"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.fixture
def tuned(tmp_path):
    """A run on pairs that has moved, with an adapter and without."""
    rows = [{"prompt": f"say {i}", "chosen": "a b c " * (1 + i % 2), "rejected": f"x {i}"} for i in range(20)]
    run = {
        "model": "lab/llama-50k", "objective": {"dpo": {"beta": 0.2}}, "optimizer": {"adamw": {"lr": 3e-2}},
        "data": {"train": write(tmp_path / "pairs.jsonl", rows), "eval_fraction": 0.3}, "train": {"steps": 5, "batch": 7},
    }  # fmt: skip

    def made(adapter):
        train({**run, **({"adapter": "lora"} if adapter else {})}, out=tmp_path / "run", quiet=True)
        return tmp_path / "run"

    return made


@pytest.mark.parametrize("adapter", [True, False])
def test_pairs_and_answers_of_a_run(tmp_path, tuned, adapter):
    """The objective's margin is that of its rewards, in β nats; the win rate is against the answers of the start."""
    from metier.core.evaluate import Generate
    from metier.core.sample import sample
    from metier.core.trained import encode_prompt, open_run

    folder = tuned(adapter)
    found = evaluate(folder, generate=Generate({"length": {"unit": "characters"}}, prompts=4, answers=3, max_new_tokens=8))
    assert found["margin"] == pytest.approx(found["chosen_reward"] - found["rejected_reward"], abs=1e-5)
    assert found["pair margin"] == pytest.approx(found["margin"] / 0.2, rel=1e-4)
    assert found["answer kl"] > 0.01
    now, start = open_run(folder).bundle, models.load("lab/llama-50k", seed=0)
    prompts = [r["prompt"] for r in map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())]
    ids = {p: encode_prompt(now.tokenizer, p)[0].numpy() for p in prompts}

    def lengths(bundle, chosen):
        rows = sample(bundle.model, bundle.tokenizer, [ids[p] for p in chosen], number=3, max_new_tokens=8, seed=0)
        return [[len(a.text) for a in row] for row in rows]

    from metier.core import config
    from metier.core.session import open_session

    run, document = config.load(json.loads((folder / "run.json").read_text())["run"], [])
    with open_session(run, document, tmp_path / "aside", quiet=True, handle_signals=False) as session:
        held = [e.prompt for e in session.held_out][:4]
    mine, theirs = lengths(now, held), lengths(start, held)
    wins = [(a > b) + 0.5 * (a == b) for own, other in zip(mine, theirs, strict=True) for a in own for b in other]
    assert found["answer win rate"] == pytest.approx(sum(wins) / len(wins))
    assert found["answer reward"] == pytest.approx(sum(map(sum, mine)) / 12)
    assert mine != theirs


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    trained(tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "MANIFEST.json").unlink()
    with pytest.raises(UsageError, match="no complete checkpoint"):
        evaluate(tmp_path / "run")
    with pytest.raises(UsageError, match="needs data"):
        evaluate("lab/llama-50k")
    with pytest.raises(UsageError, match=r"no run folder and no run file.*needs data"):
        evaluate("runs/none")
    with pytest.raises(UsageError, match="lab/llama-50k"):
        evaluate("lab/lama-50k", data="lab/pydoc")
    no_held = {**RUN, "data": {**RUN["data"], "eval_fraction": 0.0}}
    train(no_held, out=tmp_path / "plain", quiet=True)
    with pytest.raises(UsageError, match="no held-out data"):
        evaluate(tmp_path / "plain")
