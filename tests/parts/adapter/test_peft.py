"""Oracle of adapter/peft: PEFT's own model, made by hand with the same seed."""

import peft
import pytest
import torch

from metier.core import part
from metier.core.adapt import attach, load_adapter
from metier.core.errors import UsageError
from metier.testing import check_part
from metier.testing.adapter import check, disturb, logits, put, tiny


def built(config, **options):
    return part.build("adapter", {"peft": {"config": config, "options": options}})


def test_contract():
    check_part("adapter/peft")


@pytest.mark.parametrize("config", ["LoHaConfig", "LoraConfig", "OFTConfig"])
def test_contract_of_other_methods(config):
    options = {"oft_block_size": 8} if config == "OFTConfig" else {}
    # PEFT itself has no LoHa and OFT for GPT-2's transposed layers
    check(
        "adapter/peft",
        {"config": config, "options": options},
        ("llama", "gpt2")[: 1 + (config == "LoraConfig")],
    )


def test_same_as_peft_by_hand():
    torch.manual_seed(7)
    theirs = peft.get_peft_model(tiny(), peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(7)
    ours = attach(tiny(), built("LoHaConfig", r=3, alpha=5), targets=["q_proj", "up_proj"])
    assert ours.count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    disturb(ours)
    with torch.no_grad():
        mine = [p for p in ours.model.parameters() if p.requires_grad]
        for p, q in zip((p for p in theirs.parameters() if p.requires_grad), mine, strict=True):
            p.copy_(q)
    assert torch.equal(logits(ours.model), logits(theirs))


def test_model_stays_what_it_was():
    model = tiny()
    assert put(built("LoraConfig"), model).model is model


def test_pairs():
    attached = attach(tiny(), built("LoraConfig", r=2), targets="v_proj")
    assert [(a.shape, b.shape) for _, a, b in attached.pairs()] == [((2, 32), (16, 2))] * 2


@pytest.mark.parametrize(
    ("config", "message"),
    [("LohaConfig", "LoHaConfig"), ("PromptTuningConfig", "prompt"), ("PrefixTuningConfig", "prompt")],
)
def test_refused_configurations(config, message):
    with pytest.raises(UsageError, match=message):
        built(config)


def test_unknown_field_is_a_usage_error():
    with pytest.raises(UsageError, match="rnk"):
        attach(tiny(), built("LoHaConfig", rnk=3))


def test_pickled_weights_are_not_read(tmp_path):
    put(built("LoHaConfig"), tiny()).save(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UsageError, match="missing"):
        load_adapter(tiny(), tmp_path)


def test_a_classifier_trains_its_head(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    from metier.core.adapterfile import task

    def model():
        torch.manual_seed(0)
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        return BertForSequenceClassification(BertConfig(vocab_size=61, num_labels=3, **size)).eval()

    before = logits(model())
    attached = attach(model(), built("LoraConfig", r=2))
    assert any("classifier" in n for n, p in attached.model.named_parameters() if p.requires_grad)
    disturb(attached)
    with attached.disabled() as base:
        torch.testing.assert_close(logits(base), before)
    attached.save(tmp_path)
    assert task(tmp_path) == ("classify", 3)
    torch.testing.assert_close(logits(load_adapter(model(), tmp_path).model), logits(attached.model))
