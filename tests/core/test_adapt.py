"""Targets, freezing, the switch, tied weights, heads, files: what attach promises whatever the adapter."""

import contextlib
import json
import math

import pytest
import torch
from torch import nn

from metier.core import part
from metier.core.adapt import LinearAdapter, attach, load_adapter
from metier.core.errors import UsageError
from metier.core.part import Built, Card, Count
from metier.testing.adapter import disturb, logits, put, tiny, tokens

PER_BLOCK = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip


class Shift(LinearAdapter):
    """An adapter that PEFT does not have: a bias and a frozen random direction."""

    def __init__(self, base, *, rank: Count = 1):
        super().__init__(base)
        self.step = self.trainable(torch.zeros(rank))
        self.register_buffer("direction", torch.randn(base.out_features))

    def forward(self, x):
        return self.base(x) + (self.step.sum() * self.direction).to(x.dtype)

    def merged(self):
        bias = torch.zeros(self.base.out_features) if self.base.bias is None else self.base.bias
        return self.base.weight, bias + self.step.sum() * self.direction


def shift():
    from functools import partial

    return Built("adapter/shift", Card("adapter/shift", "test"), partial(Shift, rank=2), {"rank": 2})


def lora(**options):
    return part.build("adapter", {"lora": options})


def llama_names(*local):
    return [f"model.layers.{i}.{n}" for i in range(2) for n in PER_BLOCK if n in local]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, llama_names(*PER_BLOCK)),
        ("all-linear", llama_names(*PER_BLOCK)),
        ("attention", llama_names(*PER_BLOCK[:4])),
        ("mlp", llama_names(*PER_BLOCK[4:])),
        ("q_proj", llama_names("self_attn.q_proj")),
        (["[qv]_proj", "mlp"], llama_names("self_attn.q_proj", "self_attn.v_proj", *PER_BLOCK[4:])),
        ("model.layers.1.*.k_proj", ["model.layers.1.self_attn.k_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_targets_of_a_llama(targets, expected):
    assert list(attach(tiny(), lora(rank=2), targets=targets).adapters) == expected


def test_targets_of_a_gpt2():
    def names(targets):
        return [n.split(".", 2)[2] for n in attach(tiny("gpt2"), lora(rank=2), targets=targets).adapters][:4]

    assert names(None) == ["0.attn.c_attn", "0.attn.c_proj", "0.mlp.c_fc", "0.mlp.c_proj"]
    assert names("attention") == ["0.attn.c_attn", "0.attn.c_proj", "1.attn.c_attn", "1.attn.c_proj"]


def test_every_glob_must_match_and_the_nearest_is_named():
    with pytest.raises(UsageError, match="q_porj") as e:
        attach(tiny(), lora(), targets=["v_proj", "q_porj"])
    assert "q_proj" in str(e.value)


def test_tied_weights_are_refused():
    with pytest.raises(UsageError, match=r"lm_head is tied to transformer\.wte"):
        attach(tiny("gpt2"), lora(), targets="lm_head")


def test_a_second_adapter_is_refused_and_a_merged_model_can_have_another():
    attached = attach(tiny(), lora())
    with pytest.raises(UsageError, match="already"):
        attach(attached.model, lora())
    model = attached.merge()
    assert all(p.requires_grad for p in model.parameters())
    assert attach(model, lora(rank=2)).count > 0


def test_base_is_frozen_and_gets_no_gradient():
    attached = attach(tiny(), lora(rank=2), targets="q_proj")
    assert attached.count == 2 * 2 * (32 + 32)
    attached.model(tokens()).logits.sum().backward()
    assert {n.rsplit(".", 1)[-1] for n, p in attached.model.named_parameters() if p.grad is not None} == {
        "down",
        "up",
    }


def test_disabled_survives_an_error_and_nests():
    attached = put(lora(), tiny())
    disturb(attached)
    tuned = logits(attached.model)
    with contextlib.suppress(RuntimeError), attached.disabled(), attached.disabled():
        raise RuntimeError
    assert torch.equal(logits(attached.model), tuned)
    with attached.disabled():
        base = logits(attached.model)
        with attached.disabled():
            pass
        assert torch.equal(logits(attached.model), base)
        assert not torch.equal(base, tuned)


def test_model_parameters_that_train_are_switched_too():
    model = tiny()
    before = logits(model)
    attached = put(part.build("adapter", {"houlsby": {"std": 0.0}}), model)
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    with attached.disabled() as base, attached.disabled():
        torch.testing.assert_close(logits(base), before)
    assert not torch.allclose(logits(model), before)
    assert "model.norm.weight" in attached.extra


def test_reference_pass_between_forward_and_backward_leaves_gradients_right():
    def gradients(with_reference):
        attached = put(part.build("adapter", "houlsby"), tiny())
        disturb(attached)
        out = attached.model(tokens()).logits
        if with_reference:
            with attached.disabled() as base:
                logits(base)
        out.pow(2).mean().backward()
        return [p.grad for p in attached.model.parameters() if p.requires_grad]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)


def test_effective_weight_is_what_the_layer_does():
    layer = Shift(nn.Linear(4, 3))
    with torch.no_grad():
        layer.step.fill_(0.5)
    x = torch.randn(2, 4)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    layer.enabled = False
    assert layer.weight is layer.base.weight
    torch.testing.assert_close(layer(x), layer.base(x))
    assert layer.in_features == 4


def test_merging_may_add_a_bias():
    attached = put(shift(), tiny())
    disturb(attached)
    tuned = logits(attached.model)
    torch.testing.assert_close(logits(attached.merge()), tuned, rtol=1e-5, atol=1e-5)


def test_merging_keeps_half_precision_weights():
    attached = put(lora(), tiny(dtype=torch.bfloat16))
    disturb(attached)
    assert {p.dtype for p in attached.merge().parameters()} == {torch.bfloat16}


def test_own_format(tmp_path, monkeypatch):
    attached = put(shift(), tiny())
    disturb(attached)
    attached.save(tmp_path)
    facts = json.loads((tmp_path / "adapter.json").read_text())
    assert facts["format"] == "metier-adapter"
    assert facts["part"] == "adapter/shift"
    assert facts["options"] == {"rank": 2}
    assert facts["targets"] == list(attached.adapters)
    monkeypatch.setattr(part, "build", lambda *_: shift())
    again = load_adapter(tiny(), tmp_path)
    assert torch.equal(logits(again.model), logits(attached.model))


def test_peft_format_has_short_names_where_they_are_exact(tmp_path):
    attach(tiny(), lora(rank=2), targets=["q_proj", "v_proj"]).save(tmp_path / "a")
    attach(tiny(), lora(rank=2), targets=["model.layers.0.*.q_proj"]).save(tmp_path / "b")

    def names(d):
        return json.loads((tmp_path / d / "adapter_config.json").read_text())["target_modules"]

    assert names("a") == ["q_proj", "v_proj"]
    assert names("b") == ["model.layers.0.self_attn.q_proj"]


def classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def test_a_classifier_trains_its_head_and_peft_reads_it(tmp_path):
    from peft import PeftModel

    from metier.core.adapterfile import task

    attached = attach(classifier(), lora(rank=2))
    assert set(attached.extra) == {"classifier.weight", "classifier.bias"}
    assert attached.count == 2 * 2 * (4 * 32 + 2 * 40) + 16 * 3 + 3
    disturb(attached)
    attached.save(tmp_path)
    assert task(tmp_path) == ("classify", 3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["classifier"], "SEQ_CLS")
    assert torch.equal(logits(load_adapter(classifier(), tmp_path).model), logits(attached.model))
    theirs = PeftModel.from_pretrained(classifier(), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(attached.model))


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no adapter"):
        load_adapter(tiny(), tmp_path)
    attach(tiny(), lora(rank=2)).save(tmp_path)
    with pytest.raises(UsageError, match="no module model"):
        load_adapter(tiny("gpt2"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(UsageError, match="is \\[2, 32\\] in the file"):
        load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transposed_layers_are_views(family):
    model = tiny(family)
    where = {p.data_ptr() for p in model.parameters()}
    attached = put(lora(rank=2), model)
    frozen = {p.data_ptr() for p in attached.model.parameters() if not p.requires_grad}
    assert frozen == where


def test_gradient_checkpointing_and_adapter_agree():
    grads = []
    for checkpointing in (False, True):
        attached = put(lora(rank=2), tiny())
        disturb(attached)
        if checkpointing:
            attached.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            attached.model.train()
        attached.model(tokens()).logits.pow(2).mean().backward()
        grads.append([p.grad for p in attached.model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_computes_in_half_precision_and_keeps_single_precision_gradients():
    attached = put(lora(rank=2), tiny())
    disturb(attached)
    with torch.autocast("cpu", torch.bfloat16):
        out = attached.model(tokens()).logits
    out.float().pow(2).mean().backward()
    assert out.dtype == torch.bfloat16
    grads = [p.grad for p in attached.model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and math.isfinite(g.sum()) for g in grads)
