"""Comparisons by part names: the kind, the control and the claim decide the design."""

import pytest

from metier.compare import design as designs
from metier.compare.api import compare, prepare
from metier.compare.design import shorthand
from metier.core import config, part, resolve
from metier.core.errors import UsageError
from metier.core.part import Claim


def claiming(monkeypatch, id, **claim):
    """Give a part a claim, for this test."""
    obj = part.load(id)
    card = obj.__metier__
    given = {"text": "It is better", "metric": "eval_loss", "against": "optimizer/adamw", **claim}
    monkeypatch.setattr(obj, "__metier__", part.Card(card.id, card.paper, card.rows, Claim(**given), card.needs, card.conflicts))


def resolves(design):
    """Every arm is a run file that can be bound."""
    for arm in design.arms:
        document = designs.run_document(design, arm)
        resolve.resolve(*config.load(document.data))
    return True


def test_the_claim_names_the_control(monkeypatch):
    claiming(monkeypatch, "optimizer/lion", minimum_effect=0.25, text="Lion wins")
    d = shorthand(["optimizer/lion", "optimizer/adamw"])
    assert list(d.arms) == ["lion", "adamw"]
    assert (d.control, d.factor, d.seeds) == ("adamw", "optimizer", 3)
    assert (d.minimum_effect, d.question, d.name) == (0.25, "Lion wins", "lion-vs-adamw")
    assert resolves(d)


def test_a_control_that_is_not_named_is_added(monkeypatch):
    claiming(monkeypatch, "optimizer/lion", against="optimizer/sgd-momentum")
    assert list(shorthand(["optimizer/lion"]).arms) == ["lion", "sgd-momentum"]
    d = shorthand(["optimizer/lion", "optimizer/adamw"])
    assert (list(d.arms), d.control) == (["lion", "adamw", "sgd-momentum"], "sgd-momentum")


def test_the_control_of_a_claim_comes_last_wherever_it_is_named(monkeypatch):
    claiming(monkeypatch, "optimizer/lion")
    d = shorthand(["optimizer/lion", "optimizer/adamw", "optimizer/signum"])
    assert (list(d.arms), d.control) == (["lion", "signum", "adamw"], "adamw")


def test_without_a_claim_the_last_part_is_the_control():
    d = shorthand(["optimizer/adamw", "optimizer/lion"])
    assert (d.control, d.minimum_effect) == ("lion", 0.0)
    assert "optimizer" in d.question


def test_the_claims_metric_is_what_is_measured(monkeypatch):
    claiming(monkeypatch, "optimizer/lion", metric="eval_accuracy", lower_is_better=False)
    d = shorthand(["optimizer/lion"])
    assert (d.metric, d.lower_is_better) == ("eval_accuracy", False)
    assert shorthand(["optimizer/adamw", "optimizer/lion"]).metric == "eval_loss"


@pytest.mark.parametrize("kind", ["optimizer", "schedule"])
def test_a_star_is_every_part_against_what_the_lab_uses(kind):
    d = shorthand([f"{kind}/*"])
    assert set(d.arms) == {i.name for i in part.listing() if i.kind == kind}
    assert d.control == {"optimizer": "adamw", "schedule": "cosine"}[kind]
    assert (d.minimum_effect, d.metric) == (0.0, "eval_loss")
    assert resolves(d)


def test_hooks_are_compared_with_a_run_without_any():
    d = shorthand(["hook/ema", "hook/neftune"])
    assert d.arms == {"ema": {"hooks": [{"ema": {}}]}, "neftune": {"hooks": [{"neftune": {}}]}, "none": {"hooks": []}}
    assert (d.control, d.factor) == ("none", "hooks")
    assert resolves(d)


def test_names_count_once_and_may_be_written_in_any_way():
    d = shorthand(["Lion", "optimizer/lion", "sgd_momentum"])
    assert list(d.arms) == ["lion", "sgd-momentum"]


@pytest.mark.parametrize("parts", [["optimizer/lion", "schedule/cosine"], ["lion", "hook/*"]])
def test_mixed_kinds_are_refused(parts):
    with pytest.raises(UsageError, match="parts of one kind are compared; these are "):
        shorthand(parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["optimizer/loin"], "optimizer/lion"),
        (["lion", "adamv"], "'adamw'"),
        (["optimiser/*"], "Did you mean 'optimizer'"),
        (["merge/average", "merge/average"], "Write a design file"),
        (["optimizer/adamw"], "at least two arms"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_can(parts, message):
    with pytest.raises(UsageError, match=message):
        shorthand(parts)


def test_every_optimizer_is_tuned_around_its_own_default_with_as_many_trials():
    d = shorthand(["optimizer/*"])
    grids = {arm: designs.grid(d, arm, designs.run_document(d, arm)) for arm in d.arms}
    assert len({len(g) for g in grids.values()}) == 1
    for arm, grid in grids.items():
        own = part.build("optimizer", arm).obj.default_lr
        assert grid == pytest.approx([own * f for f in d.tune.factors], rel=1e-5)
    explicit = designs.load({"run": designs.BASES["optimizer"], "control": "b", "tune": {"factors": [1.0]},
                             "arms": {"a": {"optimizer": {"lion": {"lr": 0.5}}}, "b": {"optimizer": "lion"}}})[0]  # fmt: skip
    assert designs.grid(explicit, "a", designs.run_document(explicit, "a")) == [0.5]
    assert designs.grid(explicit, "b", designs.run_document(explicit, "b")) == [part.load("optimizer/lion").default_lr]


def test_schedules_are_not_tuned_and_seeds_can_be_given():
    assert shorthand(["schedule/wsd", "schedule/cosine"]).tune is None
    assert shorthand(["schedule/wsd", "schedule/cosine"], seeds=7).seeds == 7


def test_the_lab_run_is_not_shared_between_designs():
    a = shorthand(["optimizer/lion", "optimizer/adamw"])
    a.run["train"]["steps"] = 1
    assert shorthand(["optimizer/lion", "optimizer/adamw"]).run["train"]["steps"] != 1


def test_the_parts_of_a_run_file_are_found_wherever_they_stand():
    run = {
        "model": "lab/llama-1m", "data": {"train": "x", "source": {"mix": {}}}, "optimizer": "lion", "adapter": None,
        "hooks": ["ema", {"neftune": {"alpha": 1.0}}], "transform": ["qk-norm"], "train": {"steps": 1},
    }  # fmt: skip
    found = [(kind, part.split_ref(ref, kind)[0]) for kind, ref in designs.part_refs(run)]
    assert sorted(found) == [("hook", "ema"), ("hook", "neftune"), ("model", "qk-norm"), ("optimizer", "lion"), ("source", "mix")]
    assert list(designs.part_refs({"data.source": "mix", "optimizer.lr": 0.1})) == [("source", "mix")]


def test_objectives_are_compared_by_the_reward_of_their_answers(tmp_path):
    changes = ["seeds=1", "run.train.steps=2", "run.train.batch=4", "tune=null", "parallel=1"]
    hook = "run.hooks=[{answers: {prompts: lab/preferences-held-out, reward: {python: {function: metier.lab.judges:quality}}, limit: 4}}]"
    result, _ = compare(prepare(["objective/kto", "objective/dpo", *changes, hook]), out=tmp_path, quiet=True)
    for arm in ("kto", "dpo"):
        (run,) = result.finals(arm)
        assert run.metric is not None
        assert set(run.also) == {"answer_pair_accuracy", "answer_kl", "answer_length", "answer_win_rate"}
        assert run.eval_curve.value == [run.metric]
    assert not result.lower_is_better


def test_all_objectives_that_learn_from_given_answers():
    arms = prepare(["objective/*"]).arms
    assert {"dpo", "kto", "pl-dpo", "simper", "aot", "bco", "logic"} <= set(arms)
    assert not {"classify", "lm", "r3f", "bradley-terry", "sami", "typo", "xpo", "combined", "nash-md"} & set(arms)


def test_an_objective_that_looks_at_whole_distributions_can_be_counted(tmp_path):
    """Its passes without gradient must not disturb the counting of FLOPs."""
    changes = [
        "seeds=1",
        "run.train.steps=1",
        "run.train.batch=2",
        "tune=null",
        "parallel=1",
        "run.hooks=[]",
        "metric=eval_loss",
        "also=[]",
    ]
    result, _ = compare(prepare(["objective/wpo", "objective/dpo", *changes]), out=tmp_path, quiet=True)
    assert [r.error for r in result.runs] == [None, None]
