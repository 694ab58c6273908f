"""Fairness is checked before anything runs: arms differ in the named factor only and are tuned equally."""

import pytest

from metier.compare import design as designs
from metier.core.errors import UsageError

RUN = {
    "model": "lab/llama-1m",
    "data": {"train": "lab/python"},
    "optimizer": {"adamw": {"lr": 1e-3}},
    "train": {"steps": 10},
}


def design(**changes):
    given = {
        "run": RUN, "control": "b",
        "arms": {"a": {"optimizer": {"adamw": {"lr": 3e-3}}}, "b": {"optimizer": {"adamw": {"lr": 1e-3}}}},
    }  # fmt: skip
    return {**given, **changes}


def load(**changes):
    return designs.load(design(**changes))[0]


def test_a_fair_design_is_accepted_with_its_defaults():
    d = load()
    assert (d.seeds, d.factor, d.metric, d.minimum_effect) == (3, "optimizer", "eval_loss", 0.0)
    assert d.tune.factors == [0.3, 1.0, 3.0]
    assert designs.jobs_count(d) == 2 * (3 + 3)
    assert designs.jobs_count(load(tune=None, seeds=5)) == 2 * 5


@pytest.mark.parametrize("key", ["train.steps", "train.seed", "data", "train.batch", "schedule", "model", "optimizers.lr"])
def test_an_arm_that_changes_what_is_not_the_factor_is_refused(key):
    arms = {"a": {"optimizer": {"adamw": {}}, key: 1}, "b": {"optimizer": {"adamw": {}}}}
    with pytest.raises(UsageError, match=rf"arm 'a' changes '{key}'.*factor is 'optimizer'"):
        load(arms=arms)


def test_the_control_is_held_to_the_same_rule():
    with pytest.raises(UsageError, match=r"arm 'b' changes 'train\.steps'"):
        load(arms={"a": {"optimizer.lr": 1.0}, "b": {"train.steps": 1000}})


def test_dotted_keys_below_the_factor_are_part_of_it():
    d = load(factor="optimizer.lr", arms={"a": {"optimizer.lr": 1e-2}, "b": {"optimizer.lr": 1e-3}})
    assert designs.run_document(d, "a").data["optimizer"]["adamw"]["lr"] == 1e-2
    with pytest.raises(UsageError, match="changes 'optimizer'"):
        load(factor="optimizer.lr", arms={"a": {"optimizer": {"adamw": {}}}, "b": {}})


def test_what_stands_in_the_factor_may_be_declared():
    d = load(factor="train.batch", arms={"a": {"train.batch": 4}, "b": {"train.batch": 8}})
    assert designs.run_document(d, "a").data["train"] == {"steps": 10, "batch": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "c"}, "unknown control arm 'c'"),
        ({"arms": {"b": {}}}, "at least two arms"),
        ({"budget": {"tokens": 1000, "seconds": 5}}, "budget takes one of"),
        ({"run": None}, "give either base"),
        ({"base": "run.yaml"}, "give either base"),
        ({"seeds": 0}, "seeds"),
        ({"minimum_effect": -0.1}, "minimum_effect"),
        ({"tune": {"factors": [0.0, 1.0]}}, "factors"),
        ({"budget": {"steps": 3}}, "budget"),
        ({"metrics": "eval_loss"}, "metrics"),
    ],
)
def test_wrong_designs_are_refused_with_what_is_wrong(changes, message):
    with pytest.raises(UsageError, match=message):
        load(**changes)


def test_a_design_file_takes_its_name_and_base_from_where_it_lies(tmp_path):
    (tmp_path / "run.yaml").write_text("model: lab/llama-1m\n")
    path = tmp_path / "study.yaml"
    path.write_text("base: run.yaml\ncontrol: b\narms:\n  a: {optimizer.lr: 1.0}\n  b: {}\n")
    d, _ = designs.load(path, ["seeds=7"])
    assert (d.name, d.seeds, d.base) == ("study", 7, str(tmp_path / "run.yaml"))


def test_an_unfair_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("run: {model: lab/llama-1m}\ncontrol: b\narms:\n  a:\n    train.steps: 5\n  b: {}\n")
    with pytest.raises(UsageError, match=r"study\.yaml:5"):
        designs.load(path)


def test_arms_do_not_share_what_they_change():
    d = load(arms={"a": {"optimizer.lr": 5.0}, "b": {}})
    assert designs.run_document(d, "a").data["optimizer"]["adamw"]["lr"] == 5.0
    assert designs.run_document(d, "b").data["optimizer"]["adamw"]["lr"] == 1e-3
    assert d.run["optimizer"]["adamw"]["lr"] == 1e-3


def test_every_arm_is_tuned_around_its_own_value_with_as_many_trials():
    d = load(tune={"option": "train.weight", "factors": [0.5, 1.0, 2.0]}, factor="train.weight",
             arms={"a": {"train.weight": 3e-3}, "b": {"train.weight": 0.2}})  # fmt: skip
    a, b = (designs.grid(d, arm, designs.run_document(d, arm)) for arm in ("a", "b"))
    assert a == pytest.approx([1.5e-3, 3e-3, 6e-3])
    assert b == pytest.approx([0.1, 0.2, 0.4])


def test_tuning_something_an_arm_does_not_set_is_refused():
    d = load(tune={"option": "train.nothing"})
    with pytest.raises(UsageError, match=r"arm 'a' does not set train\.nothing"):
        designs.grid(d, "a", designs.run_document(d, "a"))
