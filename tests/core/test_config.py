import pytest

from metier.core import config
from metier.core.config import Data, Run, Train
from metier.core.errors import UsageError

GOOD = """\
model: lab/llama-50k
data:
  train: x.jsonl
optimizer:
  adamw: {lr: 1e-3}
hooks:
  - ema: {decay: 0.9}
train:
  steps: 3
"""


@pytest.fixture
def write(tmp_path):
    def f(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return f


def test_numbers_in_scientific_notation_are_numbers(write):
    run, _ = config.load(write(GOOD))
    assert run.optimizer == {"adamw": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  train: x.jsonl", "  trian: x.jsonl", "run.yaml:3 data.trian: unknown key in data 'trian'.*Did you mean 'train'"),
        ("model:", "modle:", "run.yaml:1 modle: unknown key.*Did you mean 'model'"),
        ("steps: 3", "steps: 0", "run.yaml:9 train.steps: steps = 0"),
        ("steps: 3", "steps: three", "run.yaml:9 train.steps: steps = 'three'"),
        ("steps: 3", "steps: 1.5", "run.yaml:9 train.steps"),
        ("data:\n  train: x.jsonl", "data: {}", "data.train is required"),
        ("steps: 3", "steps: 3\n  steps: 4", "run.yaml:.*duplicate"),
        ("steps: 3", "steps: [3", "run.yaml:"),
    ],
)
def test_errors_name_file_line_and_nearest(write, old, new, message):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        config.load(write(GOOD.replace(old, new)))


def test_missing_file_suggests_a_sibling(write):
    path = write(GOOD)
    with pytest.raises(UsageError, match="run.yaml"):
        config.load(path.with_name("rnu.yaml"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_not_a_mapping(write, text):
    with pytest.raises(UsageError, match="key: value"):
        config.load(write(text))


def test_overrides_step_through_part_references(write):
    run, document = config.load(
        write(GOOD), ["optimizer.lr=3e-4", "train.steps=7", "hooks.0.ema.decay=0.5", "schedule.warmup=0.1"]
    )
    assert run.optimizer == {"adamw": {"lr": 3e-4}}
    assert run.train.steps == 7
    assert run.hooks == [{"ema": {"decay": 0.5}}]
    assert run.schedule == {"cosine": {"warmup": 0.1}}
    assert document.where(("optimizer", "adamw", "lr")) == "override optimizer.lr=3e-4"


def test_override_by_full_name_and_replacement(write):
    assert config.load(write(GOOD), ["optimizer.adamw.lr=1"])[0].optimizer == {"adamw": {"lr": 1}}
    assert config.load(write(GOOD), ["optimizer=lion"])[0].optimizer == "lion"
    assert config.load(write(GOOD), ["adapter={lora: {rank: 4}}"])[0].adapter == {"lora": {"rank": 4}}


@pytest.mark.parametrize("bad", ["train.steps", "=3", "train.steps.x=3", "hooks.5=ema", "data.trian=x"])
def test_bad_overrides(write, bad):
    with pytest.raises(UsageError):
        config.load(write(GOOD), [bad])


PARTS = ("adapter", "objective", "optimizer", "schedule", "data.source")


def every_key():
    for section, model in (("", Run), ("data.", Data), ("train.", Train)):
        for name in model.model_fields:
            yield section + name


@pytest.mark.parametrize("key", every_key())
def test_every_key_rejects_a_wrong_type_and_is_documented_or_obvious(write, key):
    wrong = "3" if key in PARTS or key == "data.columns" else "{no: {such: [thing]}}"
    with pytest.raises(UsageError):
        config.load(write(GOOD), [f"{key}={wrong}"])
    with pytest.raises(UsageError, match="Did you mean|takes"):
        config.load(write(GOOD), [f"{key}x=1"])
