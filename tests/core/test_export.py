"""Export: what is published answers as the trained model, what does not is not published. And chat."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.core import export as exports
from metier.core import models, part, trained
from metier.core.adapt import attach
from metier.core.errors import MetierError, UsageError
from metier.testing.adapter import disturb

MODEL = "lab/llama-50k"


def make_run(folder, adapter, *, dtype="fp32", task="lm", size=0.05):
    """A run folder as training leaves it, without the training."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    bundle = models.load(MODEL, task=task, num_labels=3, dtype=kind, seed=4)
    torch.manual_seed(0)
    if adapter is not None:
        attached = attach(bundle.model, part.build("adapter", adapter))
        disturb(attached, size)
        attached.save(folder / "adapter")
    else:
        with torch.no_grad():
            for p in bundle.model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        models.save(bundle, folder / "model")
    run = {
        "model": MODEL,
        "data": {"train": "x.jsonl"},
        "adapter": adapter,
        "dtype": dtype,
        "train": {"steps": 1, "seed": 4},
    }
    record = {"run": run, "status": "done", "model": {"fingerprint": bundle.fingerprint}}
    (folder / "run.json").write_text(json.dumps(record))
    return bundle.model.eval()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def same(folder, model, **tolerance):
    names = json.loads((folder / "config.json").read_text())["architectures"]
    import transformers

    torch.testing.assert_close(logits(getattr(transformers, names[0]).from_pretrained(folder)), logits(model), **tolerance)


@pytest.mark.parametrize("adapter", [{"lora": {"rank": 4}}, {"peft": {"config": "LoHaConfig", "options": {"r": 2}}}, None])
def test_merged_model_answers_as_the_trained_one(run, tmp_path, adapter):
    model = make_run(run, adapter)
    done = exports.export(run, tmp_path / "out")
    assert done.proof.ok
    assert done.proof.total.logp < 1e-4
    assert done.proof.total.greedy == 1
    same(tmp_path / "out", model, rtol=1e-4, atol=1e-4)
    card = json.loads((tmp_path / "out" / "export_card.json").read_text())
    assert card["proof"]["total"]["positions"] == done.proof.total.positions > 50


def test_half_precision(run, tmp_path):
    make_run(run, {"lora": {"rank": 4}}, dtype="bf16")
    proof = exports.export(run, tmp_path / "out").proof
    assert proof.merge.logp < 1e-4  # the merge itself is exact; only the weights' rounding remains
    assert proof.disk.logp < 1e-5  # the rotary frequencies are computed anew in float32
    assert 0 < proof.total.kl < 1e-3
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_classifier(run, tmp_path):
    model = make_run(run, {"lora": {"rank": 4}}, task="classify")
    exports.export(run, tmp_path / "out")
    same(tmp_path / "out", model, rtol=1e-4, atol=1e-4)


def test_adapter_alone(run, tmp_path):
    make_run(run, {"lora": {"rank": 4}})
    done = exports.export(run, tmp_path / "out", merged=False)
    assert done.proof.total.logp == 0
    a, b = (load_file(f / "adapter_model.safetensors") for f in (run / "adapter", tmp_path / "out"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_houlsby_exports_only_as_an_adapter(run, tmp_path):
    make_run(run, "houlsby")
    with pytest.raises(UsageError, match="cannot be merged"):
        exports.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert exports.export(run, tmp_path / "out", merged=False).proof.total.logp == 0


def spoil_tensor(out):
    tensors = load_file(out / "model.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name] = tensors[name] * 1.2
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def spoil_config(out):
    config = json.loads((out / "config.json").read_text())
    config["num_attention_heads"], config["num_key_value_heads"] = 1, 1
    config["head_dim"] = None
    (out / "config.json").write_text(json.dumps(config))


def drop_tensor(out):
    tensors = load_file(out / "model.safetensors")
    tensors.pop(next(n for n in tensors if n.endswith("o_proj.weight")))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [spoil_tensor, drop_tensor])
def test_what_differs_is_not_published(run, tmp_path, monkeypatch, spoil):
    make_run(run, {"lora": {"rank": 4}})
    save = models.save

    def broken(bundle, out):
        save(bundle, out)
        spoil(out)

    monkeypatch.setattr(models, "save", broken)
    with pytest.raises(MetierError, match="does not answer"):
        exports.export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_forgotten_merge_is_noticed(run, tmp_path, monkeypatch, dtype):
    make_run(run, {"lora": {"rank": 4}}, dtype=dtype)
    from metier.parts.adapter.lora import LoRA

    monkeypatch.setattr(LoRA, "merged", lambda self: (self.base.weight, self.base.bias))
    with pytest.raises(MetierError, match="does not answer"):
        exports.export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_compare():
    a = torch.log_softmax(torch.tensor([[4.0, 1.0, 0.0], [0.0, 0.1, 0.0]]).double(), -1)
    assert exports.compare([a], [a.clone()]) == exports.Difference(0.0, 0.0, 1.0, 2)
    b = torch.log_softmax(torch.tensor([[1.0, 4.0, 0.0], [0.0, 0.1, 0.0]]).double(), -1)
    found = exports.compare([a], [b])
    assert found.logp == pytest.approx(3)
    assert found.kl == pytest.approx(float(torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum")) / 2)
    assert found.greedy == 0.5
    b[1, 1] = math.nan
    assert exports.compare([a], [b]).logp == math.inf
    rare = torch.tensor([[0.0, -30.0]]).double()
    assert exports.compare([rare], [rare + torch.tensor([0.0, 5.0])]).logp == 0


@pytest.mark.parametrize("which", ["merge", "disk", "total"])
def test_every_comparison_counts(which):
    from dataclasses import replace

    same = exports.Difference(0.0, 0.0, 1.0, 2)
    proof = exports.Proof(same, same, same)
    assert proof.ok
    assert not replace(proof, **{which: exports.Difference(0.5, 0.5, 1.0, 2)}).ok


def test_wrong_requests(run, tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        exports.export(tmp_path, tmp_path / "out")
    (run / "run.json").write_text(json.dumps({"run": {"model": MODEL, "data": {"train": "x"}}, "status": "interrupted"}))
    with pytest.raises(UsageError, match="no result yet"):
        exports.export(run, tmp_path / "out")
    make_run(run, None)
    with pytest.raises(UsageError, match="no adapter to export"):
        exports.export(run, tmp_path / "out", merged=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists"):
        exports.export(run, tmp_path / "full")
    with pytest.raises(UsageError, match="prompt"):
        exports.export(run, tmp_path / "out", prompts=[])
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_another_base_is_refused(run):
    make_run(run, {"lora": {"rank": 4}})
    record = json.loads((run / "run.json").read_text())
    record["model"]["fingerprint"] = "0" * 32
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(MetierError, match="not the one"):
        trained.open_run(run)


@pytest.mark.parametrize("adapter", [{"lora": {"rank": 4}}, None])
def test_base_of_a_run_is_the_model_before_training(run, adapter):
    make_run(run, adapter)
    original = models.load(MODEL, seed=4).model.eval()
    opened = trained.open_run(run)
    with opened.base() as base:
        torch.testing.assert_close(logits(base), logits(original))
    assert not torch.allclose(logits(opened.bundle.model), logits(original), atol=1e-3)


def test_answers(run):
    make_run(run, {"lora": {"rank": 4}})
    opened = trained.open_run(run)
    model, tokenizer = opened.bundle.model, opened.bundle.tokenizer

    def say(**settings):
        return trained.answer(model, tokenizer, "Once upon", max_new_tokens=8, **settings)

    ids = trained.encode_prompt(tokenizer, "Once upon")
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    eos = (expected[0, ids.shape[1] :] == tokenizer.eos_token_id).nonzero()
    assert len(eos) == 0  # of this seed
    assert say() == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    state = torch.get_rng_state()
    assert say(temperature=1.0, seed=1) == say(temperature=1.0, seed=1) != say(temperature=1.0, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_decoding_parts_are_used(run):
    make_run(run, {"lora": {"rank": 4}})
    opened = trained.open_run(run)
    entered = []

    class Only:
        def attach(self, model, tokenizer):
            import contextlib

            entered.append(type(model).__name__)
            return contextlib.nullcontext()

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -math.inf).index_fill_(-1, torch.tensor([40]), 0.0)

    said = trained.answer(opened.bundle.model, opened.bundle.tokenizer, "A", max_new_tokens=3, decode=[Only()])
    assert said == opened.bundle.tokenizer.decode([40] * 3)
    assert len(entered) == 1


@pytest.fixture
def command(capsys):
    def call(*args):
        from metier.cli import main

        with pytest.raises(SystemExit) as e:
            main([str(a) for a in args])
        return e.value.code, capsys.readouterr()

    return call


def test_export_command(run, tmp_path, command):
    make_run(run, {"lora": {"rank": 4}})
    assert command("export", run)[0] == 2
    code, said = command("export", run, "--merged", tmp_path / "out", "--prompt", "Hello", "--json")
    assert code == 0
    assert json.loads(said.out)["proof"]["disk"]["logp"] == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_chat_command(run, command, monkeypatch):
    import io

    make_run(run, {"lora": {"rank": 4}}, size=0.5)
    code, said = command("chat", run, "Once upon", "--max-new-tokens", 4, "--json")
    (turn,) = json.loads(said.out)
    assert code == 0
    assert turn["prompt"] == "Once upon"
    assert turn["base"] != turn["tuned"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    code, said = command("chat", run, "--max-new-tokens", 2)
    assert [line for line in said.out.splitlines() if line.startswith("prompt")] == [
        "prompt | one",
        "prompt | two",
    ]
    assert said.out.count("base   |") == said.out.count("tuned  |") == 2
    assert command("chat", run, "x", "--decode", "no-such")[0] == 2


def test_a_merged_adapter_on_a_transformed_model_is_read_again(run, tmp_path):
    """The exported config must name the transforms: without them the weights of the norms fit nowhere."""
    bundle = models.load(MODEL, seed=4)
    changed = models.transformed(bundle, [part.build("model", "qk-norm").obj], ["qk-norm"])
    torch.manual_seed(0)
    attached = attach(changed.model, part.build("adapter", "lora"))
    disturb(attached, 0.05)
    attached.save(run / "adapter")
    settings = {
        "model": MODEL,
        "data": {"train": "x.jsonl"},
        "adapter": "lora",
        "transform": ["qk-norm"],
        "train": {"steps": 1, "seed": 4},
    }
    (run / "run.json").write_text(json.dumps({"run": settings, "status": "done"}))
    exports.export(run, tmp_path / "out", merged=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["metier_transforms"] == ["qk-norm"]
    again = models.load(str(tmp_path / "out")).model.eval()
    torch.testing.assert_close(logits(again), logits(changed.model.eval()), rtol=1e-4, atol=1e-4)
