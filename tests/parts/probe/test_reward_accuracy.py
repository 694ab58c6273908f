"""Oracle of probe/reward-accuracy: statsmodels-like intervals worked out otherwise, and whole sequences scored one by one.

Bugs it is meant to catch: ties counted as right or wrong, policy and reference exchanged, the log-ratio not divided by its own
length, the reference's scores of one set used for another, the probed data ignored.
"""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from metier.core import config, models, part
from metier.core.api import train
from metier.core.batch import Pairs, Rewards, Tokens
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.lossmodule import LossModule
from metier.core.probing import Probe, probe_session, undisturbed
from metier.core.scores import reference_scorer
from metier.core.session import open_session
from metier.lab import preferencebench, wordpairs
from metier.parts.probe._pairs import encoded
from metier.parts.probe.reward_accuracy import ranked, reward_accuracy
from metier.testing import check_part


def test_contract():
    check_part("probe/reward-accuracy")


def test_ties_count_half_and_what_depends_on_the_prompt_only_changes_nothing():
    w, l = np.array([1.0, 0.0, 2.0, -1.0]), np.array([0.0, 0.0, 3.0, -2.0])  # noqa: E741
    found = ranked(w, l)
    assert found["accuracy"] == 2.5 / 4
    assert found["ties"] == 0.25
    assert found["margin"] == pytest.approx(0.25)
    shift = np.array([10.0, -3.0, 0.5, 100.0])
    assert ranked(w + shift, l + shift)["accuracy"] == found["accuracy"]
    assert ranked(0.3 * w, 0.3 * l)["accuracy"] == found["accuracy"]


def test_new_synonyms_leave_an_explicit_reward_alone_and_blind_an_implicit_one():
    """Answers of one token, a frozen backbone. The head sees what an answer means, the policy has a row of its own for every
    token: rows of tokens that no pair has are never moved, since the normaliser cancels in a difference of log-ratios."""
    g = torch.Generator().manual_seed(0)
    size, kinds, number = 8, 12, 400
    meaning = torch.randn(kinds, size, generator=g, dtype=torch.float64)
    h = torch.randn(number, size, generator=g, dtype=torch.float64)
    pairs = torch.stack([torch.randperm(kinds, generator=g)[:2] for _ in range(number)])
    true = torch.randn(size, generator=g, dtype=torch.float64)
    score = ((h[:, None] * meaning[pairs]) @ true).argsort(1, descending=True)
    w, l = pairs.gather(1, score).T  # noqa: E741 - of set A; token k + kinds of set B means the same
    head = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2 * kinds, size, generator=g, dtype=torch.float64)
    rows = before.clone().requires_grad_()

    def explicit(token):
        return (h * meaning[token % kinds]) @ head

    def logps(weight, token):
        return (h @ weight.T).log_softmax(1).gather(1, token[:, None])[:, 0]

    def implicit(token):
        return logps(rows, token) - logps(before, token)

    ones = torch.ones(number, dtype=torch.float64)
    bt, dpo = (part.build("objective", o).obj for o in ("bradley-terry", {"dpo": {"beta": 1.0}}))
    for _ in range(150):
        loss = bt(Rewards(explicit(w), explicit(l)))[0].mean()
        loss = loss + dpo(Pairs(logps(rows, w), logps(rows, l), ones, ones, logps(before, w), logps(before, l)))[0].mean()
        for p, slope in zip((head, rows), torch.autograd.grad(loss, (head, rows)), strict=True):
            p.data -= 2.0 * slope
    seen = {
        name: ranked(f(w + shift).detach(), f(l + shift).detach())
        for name, f, shift in (("ex", explicit, 0), ("ex B", explicit, kinds), ("im", implicit, 0), ("im B", implicit, kinds))
    }
    assert seen["ex"]["accuracy"] > 0.9
    assert seen["im"]["accuracy"] > 0.9
    assert seen["ex B"] == seen["ex"]
    assert (implicit(w + kinds) - implicit(l + kinds)).abs().max() < 1e-12
    assert abs(rows.data - before)[kinds:].max() < 1e-12 < abs(rows.data - before)[:kinds].max()


# --- on models ---------------------------------------------------------------------------------------------------------


def probe_of(bundle, objective, reads, reference=None, layouts=()):
    module = LossModule(bundle.model.eval(), part.build("objective", objective), reference)
    return Probe(bundle, module, reads, list(layouts), Engine(torch.device("cpu"), "fp32", "ddp"))


def reference_of(bundle):
    return reference_scorer(bundle.model, nullcontext)


@pytest.fixture
def rows(tmp_path):
    made = wordpairs.pairs(40, 8)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    return made, str(tmp_path / "pairs.jsonl")


def test_at_the_start_everything_ties(rows):
    bundle = preferencebench.sft()
    found = reward_accuracy(probe_of(bundle, "dpo", Pairs, reference_of(preferencebench.sft())), data={"x": rows[1]})
    assert found["reward"] == "implicit"
    (seen,) = found["sets"]
    assert (seen["pairs"], seen["accuracy"], seen["ties"]) == (40, 0.5, 1.0)
    assert seen["per_token"]["accuracy"] == 0.5
    zero = models.load("lab/words-sft", task="classify", num_labels=1)
    zero.model.score.weight.data.zero_()
    (seen,) = reward_accuracy(probe_of(zero, "bradley-terry", Rewards), data={"x": rows[1]})["sets"]
    assert (seen["accuracy"], seen["ties"]) == (0.5, 1.0)


def moved(seed=0, **more):
    """The fine-tuned model with its weights disturbed."""
    bundle = models.load("lab/words-sft", **more)
    g = torch.Generator().manual_seed(seed)
    for p in bundle.model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    return bundle


def sequence(bundle, prompt, answer):
    ids = bundle.tokenizer(prompt)["input_ids"]
    own = [*bundle.tokenizer(answer)["input_ids"], bundle.tokenizer.eos_token_id]
    return ids, own


def logp(bundle, prompt, answer):
    ids, own = sequence(bundle, prompt, answer)
    with torch.no_grad():
        z = bundle.model(torch.tensor([ids + own])).logits[0].double().log_softmax(-1)
    return sum(float(z[len(ids) - 1 + i, t]) for i, t in enumerate(own)), len(own)


def test_implicit_reward_against_each_sequence_alone(rows):
    policy, base = moved(), preferencebench.sft()
    (seen,) = reward_accuracy(probe_of(policy, "dpo", Pairs, reference_of(base)), data={"x": rows[1]})["sets"]
    summed, per_token = [], []
    for r in rows[0]:
        ratio = {}
        for key in ("chosen", "rejected"):
            a, n = logp(policy, r["prompt"], r[key])
            ratio[key] = a - logp(base, r["prompt"], r[key])[0], n
        summed.append(ratio["chosen"][0] - ratio["rejected"][0])
        per_token.append(ratio["chosen"][0] / ratio["chosen"][1] - ratio["rejected"][0] / ratio["rejected"][1])
    for got, expected in ((seen, summed), (seen["per_token"], per_token)):
        assert got["margin"] == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-5)
        assert got["accuracy"] == pytest.approx(np.mean(np.array(expected) > 0))
    assert seen["accuracy"] != 0.5


def test_likelihood_without_a_reference(rows):
    policy = moved()
    found = reward_accuracy(probe_of(policy, "simpo", Pairs), data={"x": rows[1]})
    assert found["reward"] == "likelihood"
    expected = [logp(policy, r["prompt"], r["chosen"])[0] - logp(policy, r["prompt"], r["rejected"])[0] for r in rows[0]]
    assert found["sets"][0]["margin"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert reward_accuracy(probe_of(policy, "lm", Tokens), data={"x": rows[1]}) == found


def test_explicit_reward_of_several_sets(rows, tmp_path):
    bundle = moved(task="classify", num_labels=1)
    other = tmp_path / "swapped.jsonl"
    other.write_text("".join(json.dumps({**r, "chosen": r["rejected"], "rejected": r["chosen"]}) + "\n" for r in rows[0]))
    found = reward_accuracy(probe_of(bundle, "bradley-terry", Rewards), data={"as they are": rows[1], "swapped": str(other)})
    assert found["reward"] == "explicit"
    a, b = found["sets"]
    assert (a["name"], b["name"]) == ("as they are", "swapped")
    assert a["accuracy"] + b["accuracy"] == pytest.approx(1)
    assert "per_token" not in a
    margins = []
    for r in rows[0]:
        ends = [sequence(bundle, r["prompt"], r[k]) for k in ("chosen", "rejected")]
        w, l = (bundle.model(torch.tensor([p + x])).logits.item() for p, x in ends)  # noqa: E741
        margins.append(w - l)
    assert a["margin"] == pytest.approx(np.mean(margins), rel=1e-4, abs=1e-6)


def test_the_probed_data_by_default(rows):
    bundle = moved(task="classify", num_labels=1)
    layouts = encoded(probe_of(bundle, "bradley-terry", Rewards), rows[1], max_length=128)
    probe = probe_of(bundle, "bradley-terry", Rewards, layouts=layouts)
    (own,) = reward_accuracy(probe)["sets"]
    (named,) = reward_accuracy(probe, data={"data": rows[1]})["sets"]
    assert own == named
    assert reward_accuracy(probe_of(bundle, "bradley-terry", Rewards))["sets"] == []


@pytest.mark.parametrize("scores", ["live", "kept"])
@pytest.mark.parametrize("adapter", [None, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_of_a_run(tmp_path, rows, scores, adapter):
    """What the probe says of a run's held-out data is what the run says; kept reference scores serve for these only."""
    kept = str(tmp_path / "kept") if scores == "kept" else scores
    run = {
        "model": "lab/words-sft", "objective": "dpo", "optimizer": {"adamw": {"lr": 1e-3}}, "reference_scores": kept,
        "data": {"train": "lab/preferences", "limit": 60, "eval_fraction": 0.4, "max_length": 128},
        "train": {"steps": 3, "batch": 8},
    } | ({} if adapter is None else {"adapter": adapter})  # fmt: skip
    done = train(run, out=tmp_path / "run", quiet=True, handle_signals=False)
    settings, document = config.load(run, [])
    from metier.core import checkpoint

    with open_session(settings, document, tmp_path / "aside", quiet=True, handle_signals=False) as session:
        checkpoint.resume(session, tmp_path / "run")
        with undisturbed(probe_session(session, on="eval")) as probe:
            (seen,) = reward_accuracy(probe)["sets"]
            assert seen["accuracy"] == pytest.approx(done.metrics["eval_accuracy"])
            assert 0.1 * seen["margin"] == pytest.approx(done.metrics["eval_margin"], rel=1e-4)
            if scores == "kept":
                with pytest.raises(UsageError, match="kept for its own data"):
                    reward_accuracy(probe, data={"x": rows[1]})
            else:
                assert reward_accuracy(probe, data={"x": rows[1]})["reward"] == "implicit"
