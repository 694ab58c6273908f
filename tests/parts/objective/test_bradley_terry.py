"""Oracle of objective/bradley-terry: the formula in float64 numpy, trl's RewardTrainer, and a model trained, saved and read back.

Bugs it is meant to catch: margin or centering with the wrong sign or of the wrong scores, the head read at the prompt or at
padding, a head that stays frozen under an adapter or is not saved, answers that see each other when they share a prompt.
"""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.api import train
from metier.core.batch import Pairs, Rewards
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.evaluate import evaluate
from metier.core.lossmodule import LossModule
from metier.core.scores import answer_rewards
from metier.core.separate import separate
from metier.core.trained import open_run
from metier.testing import check_part

RNG = np.random.default_rng(0)
W, L, GAP = 3 * RNG.normal(size=9), 3 * RNG.normal(size=9), RNG.normal(size=9)


def loss_of(b, **options):
    return part.build("objective", {"bradley-terry": options}).obj(b)


def rewards(chosen, rejected, margin=None):
    return Rewards(*(None if v is None else torch.as_tensor(v, dtype=torch.float64) for v in (chosen, rejected, margin)))


def test_contract():
    check_part("objective/bradley-terry")


@pytest.mark.parametrize("scale", [0.0, 0.7])
@pytest.mark.parametrize("centering", [0.0, 0.01, 1.0])
def test_value_and_gradient(scale, centering):
    b = rewards(W, L, GAP)
    b.chosen.requires_grad_()
    b.rejected.requires_grad_()
    loss, _ = loss_of(b, margin_scale=scale, centering=centering)
    loss.sum().backward()
    z = W - L - scale * GAP
    np.testing.assert_allclose(loss.detach(), np.logaddexp(0, -z) + centering * (W + L) ** 2, rtol=1e-12)
    wrong, both = 1 / (1 + np.exp(z)), 2 * centering * (W + L)
    np.testing.assert_allclose(b.chosen.grad, -wrong + both, rtol=1e-9)
    np.testing.assert_allclose(b.rejected.grad, wrong + both, rtol=1e-9)


def test_start_ties_and_metrics():
    b = rewards([0.0, 2.0, -1.0], [0.0, 1.0, 3.0])
    loss, metrics = loss_of(b)
    assert loss[0].item() == pytest.approx(np.log(2), rel=1e-12)
    assert metrics["accuracy"].tolist() == [0.5, 1.0, 0.0]
    assert metrics["margin"].tolist() == [0.0, 1.0, -4.0]


def test_what_depends_on_the_prompt_only_changes_nothing_but_the_centering():
    shift = RNG.normal(size=9)
    a, b = rewards(W, L), rewards(W + shift, L + shift)
    torch.testing.assert_close(loss_of(a)[0], loss_of(b)[0], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(loss_of(a, centering=0.1)[0], loss_of(b, centering=0.1)[0])


def test_without_scores():
    assert torch.equal(loss_of(rewards(W, L, GAP))[0], loss_of(rewards(W, L))[0])  # the default ignores them
    with pytest.raises(UsageError, match="needs the scores"):
        loss_of(rewards(W, L), margin_scale=1.0)


@pytest.mark.parametrize("centering", [None, 0.01, 0.5])
@pytest.mark.parametrize("with_margin", [False, True])
def test_by_trl(centering, with_margin):
    """trl's ``RewardTrainer.compute_loss`` on the same scores: mean loss and gradients."""
    trl = pytest.importorskip("trl")
    scores = torch.tensor(np.concatenate([W, L]), requires_grad=True)
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=centering), accelerator=same,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(1)} | ({"margin": torch.tensor(GAP)} if with_margin else {})
    theirs = trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores.unsqueeze(1)), inputs)
    theirs.backward()
    b = rewards(W, L, GAP)
    b.chosen.requires_grad_()
    b.rejected.requires_grad_()
    ours = loss_of(b, margin_scale=float(with_margin), centering=centering or 0.0)[0].mean()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    np.testing.assert_allclose(torch.cat([b.chosen.grad, b.rejected.grad]), scores.grad, rtol=1e-9, atol=1e-14)


# --- on models ---------------------------------------------------------------------------------------------------

MADE = [([5, 6], [7, 8, 9], [10]), ([11, 12, 13], [14], [15, 16]), ([4], [5, 6, 7, 8], [9, 10])]


def reward_model():
    return models.load("lab/llama-50k", task="classify", num_labels=1, seed=1).model.double().eval()


def layout():
    items = [
        Item(np.array(p), np.zeros(len(p), bool), (np.array(a), np.array(b)), (np.ones(len(a), bool), np.ones(len(b), bool)), "x")
        for p, a, b in MADE
    ]
    return collate(items, pad_id=3)


def test_the_head_is_read_at_the_last_token_of_each_answer():
    """Against each whole sequence alone through transformers' own forward, which reads the last token."""
    model = reward_model()
    alone = [[model(input_ids=torch.tensor([p + x])).logits.item() for x in (a, b)] for p, a, b in MADE]
    got = answer_rewards(model, layout()).view(-1, 2)
    np.testing.assert_allclose(got.detach(), alone, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(answer_rewards(model, separate(layout(), 3)).view(-1, 2).detach(), alone, rtol=1e-6, atol=1e-9)
    total, units, metrics = LossModule(model, part.build("objective", "bradley-terry"))(layout())
    margins = np.array([w - l for w, l in alone])  # noqa: E741
    assert units == 3
    assert float(total.detach()) == pytest.approx(np.logaddexp(0, -margins).sum(), rel=1e-6)
    assert float(metrics["margin"]) == pytest.approx(margins.sum(), rel=1e-5, abs=1e-7)


def test_an_answer_does_not_move_the_other_ones_reward():
    model, seen = reward_model(), layout()
    other = seen.input_ids.clone()
    other[seen.branch == 2] = 40
    before = answer_rewards(model, seen).view(-1, 2)
    after = answer_rewards(model, type(seen)(**{**vars(seen), "input_ids": other})).view(-1, 2)
    torch.testing.assert_close(before[:, 0], after[:, 0], rtol=1e-9, atol=1e-12)
    assert (before[:, 1] != after[:, 1]).all()


def test_prompts_once_or_with_each_answer(tmp_path):
    """The same run with rows that share a prompt and with rows of their own: the same rewards up to rounding."""
    found = {
        once: train(run_of(steps=3, data={"prompt_once": once}), out=tmp_path / str(once), quiet=True, handle_signals=False)
        for once in (True, False)
    }
    for key in ("loss", "grad_norm", "eval_loss", "eval_margin"):
        assert found[True].metrics[key] == pytest.approx(found[False].metrics[key], rel=2e-3, abs=1e-5), key


def run_of(*, steps=6, lr=1e-3, data=None, **more):
    return {
        "model": "lab/llama-50k", "objective": "bradley-terry", "optimizer": {"adamw": {"lr": lr}},
        "data": {"train": "lab/preferences", "limit": 48, "eval_fraction": 0.25, "max_length": 256, **(data or {})},
        "train": {"steps": steps, "batch": 8, "seed": 0}, **more,
    }  # fmt: skip


@pytest.mark.parametrize("adapter", [None, {"lora": {"rank": 2}}, {"houlsby": {}}], ids=["full", "lora", "houlsby"])
def test_trained_saved_and_read_back(tmp_path, adapter):
    done = train(run_of(**({} if adapter is None else {"adapter": adapter})), out=tmp_path, quiet=True, handle_signals=False)
    start = models.load("lab/llama-50k", task="classify", num_labels=1, seed=0).model
    back = open_run(tmp_path).bundle.model
    assert type(back).__name__ == "LlamaForSequenceClassification"
    assert back.config.num_labels == 1
    assert back.score.weight.shape == (1, start.config.hidden_size)
    assert not torch.equal(back.score.weight, start.score.weight)  # new, so trained whole even beside an adapter
    again = evaluate(tmp_path)
    assert again["loss"] == pytest.approx(done.metrics["eval_loss"], rel=1e-5)
    assert again["accuracy 95 %"][0] < again["accuracy"] < again["accuracy 95 %"][1]
    with torch.no_grad():
        got = answer_rewards(back, layout())
        plain = models.load("lab/llama-50k", task="classify", num_labels=1, seed=0).model
        assert not torch.allclose(got, answer_rewards(plain.eval(), layout()))
    folder = tmp_path / ("model" if adapter is None else "adapter")
    assert any("score.weight" in name for name in _stored(folder))


def _stored(folder):
    from safetensors import safe_open

    names = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            names += list(f.keys())
    return names


def test_scores_of_the_trained_and_of_the_read_model_agree(tmp_path):
    from metier.core import config
    from metier.core.session import open_session

    for name, more in (("full", {}), ("lora", {"adapter": {"lora": {"rank": 2}}})):
        run, document = config.load(run_of(**more), [])
        with open_session(run, document, tmp_path / name, quiet=True, handle_signals=False) as session:
            session.train(keep_weights=True)
            with torch.no_grad():
                trained = answer_rewards(session.context.bundle.model.eval(), layout())
        with torch.no_grad():
            torch.testing.assert_close(answer_rewards(open_run(tmp_path / name).bundle.model, layout()), trained)


def test_peft_reads_the_adapter_with_its_head(tmp_path):
    peft = pytest.importorskip("peft")
    train(run_of(adapter={"lora": {"rank": 2}}), out=tmp_path, quiet=True, handle_signals=False)
    base = models.load("lab/llama-50k", task="classify", num_labels=1, seed=0).model  # its fresh head is of another seed
    base.score.weight.data.zero_()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = open_run(tmp_path).bundle.model
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
        assert ours(input_ids=ids).logits.abs() > 0


def test_only_causal_models_with_a_scalar_head(tmp_path):
    lm = models.load("lab/llama-50k").model
    with pytest.raises(UsageError, match="no scalar head"):
        answer_rewards(lm, layout())
    with pytest.raises(UsageError, match="bert"):
        train(run_of(model="lab/bert-1m"), out=tmp_path, quiet=True, handle_signals=False)


def test_a_saved_reward_model_alone_is_evaluated_as_one(tmp_path):
    train(run_of(), out=tmp_path, quiet=True, handle_signals=False)
    pairs = "lab/preferences-held-out"
    alone = evaluate(tmp_path / "model", ["data.eval_limit=40", "data.max_length=256"], data=pairs)
    of_run = evaluate(tmp_path, ["data.eval_limit=40"], data=pairs)
    for key in ("loss", "accuracy", "margin"):
        assert alone[key] == pytest.approx(of_run[key], rel=1e-4, abs=1e-6), key


def test_reads_rewards_not_log_probabilities():
    from metier.core.lossmodule import batch_type

    assert batch_type(part.build("objective", "bradley-terry").obj) is Rewards is not Pairs


def test_learns_a_gold_reward(tmp_path):
    """A few labels are enough on the small language whose model has been fine-tuned; 0.5 is chance."""
    run = run_of(steps=30, model="lab/words-sft", data={"limit": 400, "eval": "lab/preferences-held-out", "eval_limit": 200})
    run["train"]["batch"] = 16
    done = train(run, out=tmp_path, quiet=True, handle_signals=False)
    assert done.metrics["eval_accuracy"] > 0.65  # 0.75 is the most that noisy labels allow
