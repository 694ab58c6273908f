"""Oracle of probe/pre-memorization-accuracy: the authors' own tables, loops in plain Python, and a model's probabilities.

Bugs it is meant to catch: perplexity over the question too or without the solution's first token, the threshold on the
wrong side, the maximum over all epochs instead of the past, answers of other questions, the model left at a checkpoint.
"""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import metier.parts.probe.pre_memorization_accuracy as pm
from metier.cli import main
from metier.core import api, part
from metier.core.batch import Pairs
from metier.core.errors import UsageError
from metier.core.probing import checkpoints, undisturbed
from metier.lab.tasks import arithmetic
from metier.parts.probe import _solutions as solutions
from metier.testing import check_part
from metier.testing._tiny import layout, same, weights
from metier.testing.probe import tiny_probe

# github.com/katiekang1998/reasoning_generalization at b933853, gsm8k_orig_3epochs_full_lr2e-05_bs128: shares of 50 samples,
# perplexities (checkpoints 58, 116, 174) and unmemorized_acc_cummax_all.npy, which was made with log log Ppl >= -2.5.
# Questions 18, 17, 0, 12, 20, 29, 13, 95, 111, 19, 357, 268. All 3 x 7473 numbers agree.
ACC = [
    [0.06, 0.18, 0.98, 0.96, 0.92, 0.06, 0.88, 0.04, 0.98, 0.52, 1.0, 1.0],
    [1.0, 0.08, 1.0, 1.0, 0.88, 0.06, 0.42, 0.04, 1.0, 1.0, 0.46, 0.94],
    [1.0, 0.36, 1.0, 0.98, 1.0, 1.0, 0.5, 0.08, 1.0, 0.02, 1.0, 1.0],
]
PPL = [
    [1.302951, 1.534904, 1.083334, 1.116732, 1.089785, 2.186855, 1.062651, 1.307686, 1.135082, 1.176075, 1.170005, 1.570791],
    [1.036229, 1.558347, 1.007231, 1.05653, 1.020432, 1.16539, 1.075885, 1.064524, 1.181001, 1.192672, 1.17811, 1.073024],
    [1.003938, 1.063605, 1.002266, 1.00459, 1.003644, 1.004616, 1.058077, 1.0686, 1.067481, 1.063041, 1.065408, 1.064584],
]
PM = [
    [0.06, 0.18, 0.0, 0.96, 0.92, 0.06, 0.0, 0.04, 0.98, 0.52, 1.0, 1.0],
    [0.06, 0.08, 0.0, 0.96, 0.88, 0.06, 0.0, 0.04, 1.0, 1.0, 0.46, 0.94],
    [0.06, 0.18, 0.0, 0.96, 0.92, 0.06, 0.0, 0.04, 1.0, 0.02, 1.0, 1.0],
]


def tables(seed=0, epochs=6, examples=40):
    g = np.random.default_rng(seed)
    return g.integers(0, 6, (epochs, examples)) / 5, 1 + g.exponential(0.3, (epochs, examples))


def test_contract():
    check_part("probe/pre-memorization-accuracy")


def test_the_authors_numbers():
    np.testing.assert_array_equal(pm.pre_memorization(ACC, PPL, math.exp(math.exp(-2.5))), PM)


def test_against_loops():
    acc, ppl = tables()
    got = pm.pre_memorization(acc, ppl, 1.2)
    for e in range(len(acc)):
        for i in range(acc.shape[1]):
            best = max([acc[d][i] if ppl[d][i] > 1.2 else 0.0 for d in range(e + 1)])
            assert got[e][i] == min(best, acc[e][i])


def test_identities():
    acc, ppl = tables(1)
    np.testing.assert_array_equal(pm.pre_memorization(acc, ppl, 0.0), acc)
    assert not pm.pre_memorization(acc, ppl, math.inf).any()
    assert (pm.pre_memorization(acc, ppl, 1.15) <= acc).all()
    twice = np.repeat(np.arange(len(acc)), 2)  # an epoch again with the same numbers changes nothing
    np.testing.assert_array_equal(pm.pre_memorization(acc[twice], ppl[twice], 1.2), pm.pre_memorization(acc, ppl, 1.2)[twice])


def test_the_threshold_itself_is_memorised():
    assert pm.pre_memorization([[1.0]], [[1.25]], 1.25)[0, 0] == 0
    assert pm.pre_memorization([[1.0]], [[1.25]], 1.2499)[0, 0] == 1


def test_shapes_must_agree():
    with pytest.raises(UsageError, match="not tables of one shape"):
        pm.pre_memorization(np.zeros((2, 3)), np.zeros((3, 2)), 1.1)


def test_calibration_finds_the_p_that_made_the_data():
    candidates = [1.05, 1.1, 1.2, 1.4]
    runs = [(a, q, pm.pre_memorization(a, q, 1.2).mean(1)) for a, q in (tables(s) for s in (2, 3))]
    assert pm.calibrated(runs, candidates) == 1.2


def test_r_squared():
    g = np.random.default_rng(0)
    x = g.normal(size=30)
    y = 2 * x + g.normal(size=30)
    slope, offset = np.polyfit(x, y, 1)
    expected = 1 - ((y - slope * x - offset) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert pm.r_squared(x, y) == pytest.approx(expected, rel=1e-10)
    assert pm.r_squared(x, [1.0] * 30) == 0.0


# --- what is read from layouts -------------------------------------------------------------------------------------


def asking(*pairs):
    """A probe whose layout holds (question, solution) as token ids."""
    probe = tiny_probe(1)
    made = layout([[*q, *s] for q, s in pairs])
    keep = torch.tensor([int(c) >= len(pairs[int(r)][0]) - 1 for r, c in zip(made.row, made.col, strict=True)])
    made = replace(made, **{k: getattr(made, k)[keep] for k in ("row", "col", "target", "sequence")})
    return replace(probe, layouts=[made])


def test_perplexity_is_of_the_solution_alone_and_of_all_of_it():
    pairs = [([5, 6, 7], [8, 9]), ([4, 3], [2, 11, 12, 13])]
    probe = asking(*pairs)
    found = solutions.solved(probe)
    assert [x.prompt.tolist() for x in found] == [q for q, _ in pairs]
    for got, (question, solution) in zip(solutions.perplexities(probe, found), pairs, strict=True):
        with torch.no_grad():
            logits = probe.model(input_ids=torch.tensor([question + solution])).logits[0].double().numpy()
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        nll = [-logp[len(question) - 1 + k, t] for k, t in enumerate(solution)]
        assert got == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)


def test_in_a_conversation_the_last_turn_counts():
    probe = asking(([5, 6], [7, 8, 9, 10, 11]))
    whole = probe.layouts[0]
    keep = torch.tensor([True, False, False, True, True])  # targets 7, and 10 11
    turns = replace(whole, **{k: getattr(whole, k)[keep] for k in ("row", "col", "target", "sequence")})
    (found,) = solutions.solved(replace(probe, layouts=[turns]))
    assert (found.prompt.tolist(), found.targets.tolist()) == ([5, 6, 7, 8, 9], [1, 2])


def test_answers_belong_to_their_questions():
    """A model that repeats the question's last token is right exactly where the solution starts with it."""
    probe = asking(([5, 6, 7], [7]), ([4, 3], [9]), ([2, 8], [8]), ([2, 6, 5], [5]))
    shapes = []

    def generate(ids, *, num_return_sequences, **_):
        shapes.append(tuple(ids.shape))
        return torch.cat([ids, ids[:, -1:]], 1).repeat_interleave(num_return_sequences, 0)

    probe.model.generate = generate
    found = [replace(x, trace=probe.bundle.tokenizer.decode(probe.layouts[0].target[x.targets])) for x in solutions.solved(probe)]

    def check(prompts, completions, answers):
        return torch.tensor([[float(c == a) for c in row] for row, a in zip(completions, answers, strict=True)])

    assert solutions.accuracies(probe, found, check, {"num_return_sequences": 3}, batch=1) == [1.0, 0.0, 1.0, 1.0]
    assert sorted(shapes) == [(1, 2), (1, 2), (1, 3), (1, 3)]  # one length and at most `batch` questions at a time


def test_samples_and_reward(monkeypatch):
    probe = asking(([5, 6, 7], [7, 9]))
    seen = {}
    monkeypatch.setattr(probe.model, "generate", partial(_two_of_four, seen))
    monkeypatch.setattr(probe.bundle.tokenizer, "decode", lambda *a, **k: "2 + 2 = 4\n#### 4")
    monkeypatch.setattr(probe.bundle.tokenizer, "batch_decode", lambda out, **k: [f"#### {int(t[0])}" for t in out])
    found = part.build("probe", {"pre-memorization-accuracy": {"samples": 4, "threshold": 1.01}}).obj(probe)
    assert (found["accuracy"], found["pm"], found["examples_used"], found["without_answer"]) == (0.5, 0.5, 1, 0)
    wanted = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "do_sample": True, "max_new_tokens": 4}
    assert {k: seen[k] for k in wanted} == wanted
    memorised = part.build("probe", {"pre-memorization-accuracy": {"samples": 4, "threshold": 1e9}}).obj(probe)
    assert (memorised["accuracy"], memorised["pm"], memorised["memorised"]) == (0.5, 0.0, 1.0)


def _two_of_four(seen, ids, **options):
    seen.update(options)
    return torch.cat([ids.repeat(4, 1), torch.tensor([[4], [5], [4], [1]])], 1)


def test_preferences_are_refused():
    with pytest.raises(UsageError, match="generative model"):
        part.build("probe", {"pre-memorization-accuracy": {}}).obj(replace(tiny_probe(1), reads=Pairs))


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pm")
    rows = "".join(json.dumps(r) + "\n" for r in arithmetic(12))
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    api.train(
        {
            "model": "lab/llama-50k", "data": {"train": str(folder / "train.jsonl")}, "optimizer": {"adamw": {"lr": 1e-2}},
            "train": {"epochs": 3, "batch": 4, "save_every": 3, "keep": 9},
        },
        out=folder / "run", quiet=True, handle_signals=False,
    )  # fmt: skip
    return folder / "run"


def test_all_checkpoints_of_a_run_are_measured(run, capsys):
    """On the training data of a finished run, whose position in the data is at their end."""
    argv = ["probe", "pre-memorization-accuracy", str(run), "--on", "train", "--batches", "3", "--json", "samples=2"]
    with pytest.raises(SystemExit) as e:
        main([*argv, "max_new_tokens=4"])
    said = capsys.readouterr()
    assert e.value.code == 0, said.err
    found = json.loads(said.out)["result"]
    assert [r["step"] for r in found["checkpoints"]] == [3, 6, 9]
    ppl = [r["perplexity"] for r in found["checkpoints"]]
    assert ppl[0] > ppl[1] > ppl[2] > 1
    shape = np.array(found["tables"]["perplexity"]).shape
    assert shape == (3, found["examples_used"]) == np.array(found["tables"]["accuracy"]).shape
    assert len({e["id"] for e in found["examples"]}) == found["examples_used"] > 1


def test_checkpoints_leave_the_model_as_it_was(run):
    probe = replace(tiny_probe(1), folder=run)
    before = weights(probe.model)
    seen = []
    with undisturbed(probe):
        for step in checkpoints(probe):
            seen.append((step, weights(probe.model)))
    assert [s for s, _ in seen] == [3, 6, 9]
    assert same(weights(probe.model), before)
    assert not any(same(w, before) for _, w in seen)
    broken = checkpoints(probe)
    next(broken)
    broken.close()
    assert same(weights(probe.model), before)
    assert list(checkpoints(replace(probe, folder=None))) == [None]
