"""Merging on disk: streaming, refusals before anything is written, nothing left after a failure."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.core import merging, part
from metier.core.errors import MetierError, UsageError
from metier.core.part import Built, Card
from metier.testing.adapter import logits, tiny


def average(**options):
    return part.build("merge", {"average": options})


def fake(function, needs=()):
    return Built("merge/fake", Card("merge/fake", "test", needs=frozenset(needs)), function, {})


@pytest.fixture
def soups(tmp_path):
    """Two models near each other, saved; the first one's folder has a tokenizer file."""
    folders = []
    for seed in (1, 2):
        model = tiny()
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        model.save_pretrained(tmp_path / f"m{seed}")
        folders.append(tmp_path / f"m{seed}")
    (folders[0] / "tokenizer.json").write_text("{}")
    return folders


def test_merge_is_the_average_and_loads_as_a_model(soups, tmp_path):
    from transformers import AutoModelForCausalLM

    done = merging.merge(average(weights=[1.0, 3.0]), soups, tmp_path / "out")
    a, b, c = (load_file(f / "model.safetensors") for f in (*soups, tmp_path / "out"))
    assert set(c) == set(a)
    for name in a:
        torch.testing.assert_close(c[name].double(), 0.25 * a[name].double() + 0.75 * b[name].double(), rtol=1e-6, atol=1e-7)
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).isfinite().all()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    card = json.loads((tmp_path / "out" / "merge_card.json").read_text())
    assert card == done.card
    assert [i["path"] for i in card["inputs"]] == [str(f) for f in soups]
    digest = hashlib.sha256((soups[1] / "model.safetensors").read_bytes()).hexdigest()
    assert card["inputs"][1]["sha256"] == {"model.safetensors": digest}
    assert card["options"] == {"weights": [1.0, 3.0]}


def test_shards_in_and_out(soups, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = merging.merge(average(), soups, tmp_path / "whole").folder
    sharded = merging.merge(average(), soups, tmp_path / "sharded", shard_bytes=9000).folder
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    assert not (sharded / "model.safetensors").exists()
    expected = logits(AutoModelForCausalLM.from_pretrained(whole))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(sharded)), expected)
    again = merging.merge(average(), [sharded, whole], tmp_path / "again").folder
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), expected)


def test_inputs_come_in_the_order_written(soups, tmp_path):
    last = fake(lambda tensors, base: tensors[-1])
    merging.merge(last, soups[::-1], tmp_path / "out")
    expected = load_file(soups[0] / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_base_is_read(soups, tmp_path):
    only_base = fake(lambda tensors, base: base, needs=("base",))
    with pytest.raises(UsageError, match="needs the base"):
        merging.merge(only_base, soups, tmp_path / "out")
    merging.merge(only_base, soups[:1], tmp_path / "out", base=soups[1])
    got, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", soups[1]))
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def saved(path, **tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"wieght": torch.ones(2), "n": torch.tensor([1])}, "wieght"),
        ({"weight": torch.ones(3), "n": torch.tensor([1])}, r"'weight' is \[2\] in"),
        ({"weight": torch.ones(2), "n": torch.tensor([2])}, "'n' is not floating point"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, second, message):
    a = saved(tmp_path / "a.safetensors", weight=torch.ones(2), n=torch.tensor([1]))
    b = saved(tmp_path / "b.safetensors", **second)
    with pytest.raises(UsageError, match=message):
        merging.merge(average(), [a, b], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda tensors, base: tensors[0][:1], "made"),
        (lambda tensors, base: tensors[0] / 0, "not finite"),
    ],
)
def test_a_bad_method_leaves_nothing(tmp_path, function, message):
    a = saved(tmp_path / "a.safetensors", weight=torch.ones(2))
    with pytest.raises(MetierError, match=message):
        merging.merge(fake(function), [a, a], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_results_have_the_type_of_the_first_input(tmp_path):
    a = saved(tmp_path / "a.safetensors", weight=torch.ones(2, dtype=torch.bfloat16))
    b = saved(tmp_path / "b.safetensors", weight=torch.full((2,), 2.0))
    mean = fake(lambda tensors, base: torch.stack([t.float() for t in tensors]).mean(0))
    for order, kind in (([a, b], torch.bfloat16), ([b, a], torch.float32)):
        out = merging.merge(mean, order, tmp_path / str(kind)).folder
        (tensor,) = load_file(out / "model.safetensors").values()
        assert tensor.dtype == kind
        assert tensor.tolist() == [1.5, 1.5]


def test_existing_folder_is_left_alone(soups, tmp_path):
    with pytest.raises(UsageError, match="exists"):
        merging.merge(average(), soups, soups[0])
    assert not list(tmp_path.glob(".*tmp*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "no weights"),
        (lambda p: (p.mkdir(), (p / "adapter_config.json").write_text("{}")), "holds an adapter"),
        (
            lambda p: (p.mkdir(), (p / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")),
            "complete safetensors",
        ),
    ],
)
def test_inputs_that_are_no_models(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(UsageError, match=message):
        merging.open_input(tmp_path / "x")


def test_checkpoints_of_a_run_take_the_configuration_from_its_model(soups, tmp_path):
    run = tmp_path / "run"
    tensors = load_file(soups[0] / "model.safetensors")
    steps = [saved(run / "checkpoints" / f"step-{i:08d}" / "model.safetensors", **tensors).parent for i in (10, 20)]
    tiny().save_pretrained(run / "model")
    done = merging.merge(average(), steps, tmp_path / "out")
    assert done.card["files_from"] == str(run / "model")
    assert (tmp_path / "out" / "config.json").is_file()


def test_configurations_that_differ_are_said(soups, tmp_path):
    config = json.loads((soups[1] / "config.json").read_text())
    (soups[1] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "transformers_version": "0"}))
    assert merging.merge(average(), soups, tmp_path / "out").card["config_differs"] == ["rms_norm_eps"]


def test_command_line(soups, tmp_path, capsys):
    from metier.cli import main

    def run(*args):
        with pytest.raises(SystemExit) as e:
            main(["merge", *map(str, args)])
        return e.value.code, capsys.readouterr()

    code, said = run("average", *soups, "weights=[1, 3]", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(said.out)["options"] == {"weights": [1.0, 3.0]}
    code, said = run("avrage", *soups, "--out", tmp_path / "o2")
    assert code == 2
    assert "average" in said.err
    code, said = run("average", *soups, "wights=[1, 3]", "--out", tmp_path / "o2")
    assert code == 2
    assert "weights" in said.err
