"""Oracle of adapter/lora: W x + s B A x in float64 NumPy, and PEFT itself on the same files."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import part
from metier.core.adapt import attach, load_adapter
from metier.parts.adapter.lora import LoRA
from metier.testing import check_part
from metier.testing.adapter import disturb, logits, put, tiny


def test_contract():
    check_part("adapter/lora")


def filled(**options) -> LoRA:
    torch.manual_seed(0)
    layer = LoRA(nn.Linear(6, 4).double(), **options)
    nn.init.normal_(layer.up)
    return layer


def oracle(layer: LoRA, x: np.ndarray, scale: float) -> np.ndarray:
    w, b, a, up = (t.detach().numpy() for t in (layer.base.weight, layer.base.bias, layer.down, layer.up))
    return np.einsum("oi,ni->no", w, x) + b + scale * np.einsum("or,ri,ni->no", up, a, x)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 3}, 1.0),
        ({"rank": 3, "alpha": 12.0}, 4.0),
        ({"rank": 4, "alpha": 12.0, "rslora": True}, 6.0),
        ({"rank": 3, "rslora": True}, math.sqrt(3)),
    ],
)
def test_formula(options, scale):
    layer = filled(**options)
    x = np.random.default_rng(0).normal(size=(5, 6))
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), oracle(layer, x, scale), rtol=1e-12, atol=1e-12)
    weight, bias = layer.merged()
    expected = layer.base.weight.detach().numpy() + scale * layer.up.detach().numpy() @ layer.down.detach().numpy()
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert bias is layer.base.bias


def test_start_values():
    torch.manual_seed(0)
    layer = LoRA(nn.Linear(400, 300), rank=64)
    bound = 1 / math.sqrt(400)
    assert layer.up.abs().max() == 0
    assert 0.98 * bound < layer.down.abs().max() <= bound
    assert abs(layer.down.var().item() - bound**2 / 3) < 0.03 * bound**2


def test_dropout_acts_on_the_low_rank_branch_only_and_only_in_training():
    layer = filled(rank=3, dropout=1.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer.train()(x), layer.base(x))
    assert not torch.allclose(layer.eval()(x), layer.base(x))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"rank": 4, "alpha": 10.0}, {"rank": 4, "rslora": True}])
def test_peft_reads_what_we_write(tmp_path, family, options):
    from peft import PeftModel

    attached = put(part.build("adapter", {"lora": options}), tiny(family))
    disturb(attached)
    attached.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is (family == "gpt2")
    theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(attached.model), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(attached.merge()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_we_read_what_peft_writes(tmp_path, family):
    import peft

    names = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[family]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, fan_in_fan_out=family == "gpt2", use_rslora=True)
    theirs = peft.get_peft_model(tiny(family), config)
    for n, p in theirs.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p)
    theirs.save_pretrained(str(tmp_path))
    ours = load_adapter(tiny(family), tmp_path)
    assert ours.built.id == "adapter/lora"
    assert ours.built.options == {"rank": 3, "alpha": 5.0, "dropout": 0.0, "rslora": True}
    torch.testing.assert_close(logits(ours.model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_variants_go_through_peft(tmp_path):
    import peft

    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True))
    for n, p in theirs.named_parameters():
        if "lora_B" in n or "magnitude" in n:
            nn.init.normal_(p)
    theirs.save_pretrained(str(tmp_path))
    ours = load_adapter(tiny(), tmp_path)
    assert ours.built.id == "adapter/peft"
    torch.testing.assert_close(logits(ours.model), logits(theirs))


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"rank_pattern": {"q": 2}}, {"init_lora_weights": "pissa"}, {"something_new": [1]}],
)
def test_from_peft_refuses_what_it_cannot_express(change):
    from peft import LoraConfig

    config = json.loads(json.dumps(LoraConfig(r=2, target_modules=["q"]).to_dict(), default=list))
    assert LoRA.from_peft(config) is not None
    assert LoRA.from_peft(config | change) is None


def test_pairs_are_the_factors():
    attached = attach(tiny(), part.build("adapter", {"lora": {"rank": 2}}), targets="q_proj")
    assert [n for n, _, _ in attached.pairs()] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    _, a, b = attached.pairs()[0]
    assert (a.shape, b.shape) == ((2, 32), (32, 2))
