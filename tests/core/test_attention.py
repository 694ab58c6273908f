"""Oracle of core/attention: attention through our function must be attention as before, whatever sits in between.

Bugs it is meant to catch: masks made for another implementation, a mask that is ignored, windows and caches lost, outputs
that change under an observer, observers that see recomputed blocks or stay behind, the model's configuration changed.
"""

import copy

import pytest
import torch
import transformers

from metier.core import models
from metier.core.attention import ATTRIBUTE, attend, map_logits, map_probabilities, observe, observed, scale_logits
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.forward import hidden_states
from metier.core.scores import token_logps
from metier.core.sublayers import attentions, layers

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": 97, "pad_token_id": 3, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
FAMILIES = ["lab/llama-50k", "lab/qwen2-1m", "lab/gemma-1m", "lab/gpt2-1m", "mistral", "gemma3"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 3, 92, 42, 7, 1]])


def load(name, attention="sdpa"):
    more = {"mistral": ("MistralConfig", {}), "gemma3": ("Gemma3TextConfig", {
        "head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})}  # fmt: skip
    if name not in more:
        model = models.load(name, seed=1).model
        model.set_attn_implementation(attention)
        return model.double().eval()
    kind, extra = more[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**{**SMALL, "sliding_window": 3, "initializer_range": 0.3, **extra})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()


def rows():
    g = torch.Generator().manual_seed(0)

    def some(n):
        return torch.randint(5, 95, (n,), generator=g).int().numpy()

    items = []
    for sizes in ((4, 3, 5), (2, 2), (6, 1, 2)):
        prompt, *answers = map(some, sizes)
        masks = tuple(a > 0 for a in answers)
        items.append(Item(prompt, prompt < 0, tuple(answers), masks, "x"))
    return collate(items, pad_id=3, rows=[[0, 1], [2]])


def same(x):
    return x


def graded(model):
    model.zero_grad(set_to_none=True)
    logps = token_logps(model, rows())
    (logps * torch.linspace(-1, 2, len(logps), dtype=torch.float64)).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mapping_by_the_identity_changes_nothing(name, attention):
    plain, mapped = load(name, attention), load(name, attention)
    map_logits(mapped, same, "x")
    map_probabilities(mapped, same, "x")
    (a, ga), (b, gb) = graded(plain), graded(mapped)
    torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    for n in ga:
        torch.testing.assert_close(gb[n], ga[n], rtol=1e-4, atol=1e-5 * float(ga[n].abs().max()) + 1e-9)
    with torch.no_grad():
        torch.testing.assert_close(mapped(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    assert mapped.config._attn_implementation == attention


def test_attention_without_a_mask():
    """A model that sees both ways, and new tokens behind a cache that come without a mask."""
    plain, mapped = load("lab/bert-1m"), load("lab/bert-1m")
    map_logits(mapped, same, "x")
    with torch.no_grad():
        torch.testing.assert_close(mapped(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    model = load("lab/llama-50k")
    map_logits(model, same, "x")
    q, k, v = (torch.randn(2, n, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 3))
    module = attentions(model, "x")[0]
    whole = attend(module, q, k, v[:, :1], None)[0]
    last = attend(module, q[:, :, 3:], k, v[:, :1], None)[0]
    torch.testing.assert_close(last, whole[:, 3:])


@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_and_generation(name):
    plain, mapped = load(name), load(name)
    map_logits(mapped, same, "x")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = dict(attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=3)
    assert torch.equal(mapped.generate(IDS, **options), plain.generate(IDS, **options))


@pytest.mark.parametrize("name", ["lab/llama-50k", "lab/bert-1m", "gemma3"])
def test_an_observer_changes_no_bit_and_leaves_nothing(name):
    model = load(name)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        configs = [m.config for m in attentions(model, "x")]
        seen = []
        with observed(model, seen.append, "x"):
            inside = model(input_ids=IDS).logits
        after = model(input_ids=IDS).logits
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
    assert len(seen) == len(models.blocks(model))
    assert all(m.config is c and not hasattr(m, ATTRIBUTE) for m, c in zip(attentions(model, "x"), configs, strict=True))


def test_rows_do_not_depend_on_the_memory_limit():
    model, found = load("lab/llama-50k"), []

    def observer(seen):
        whole = list(seen.rows())
        single = list(seen.rows(limit=1))
        assert len(whole) == 1
        assert len(single) == seen.query.shape[2]
        for i in (1, 2):
            torch.testing.assert_close(torch.cat([s[i] for s in single], 2), whole[0][i], rtol=1e-12, atol=1e-15)
        found.append(whole[0])

    for layout in (rows(), None):
        with observed(model, observer, "x"), torch.no_grad():
            model(input_ids=IDS) if layout is None else hidden_states(model, layout)
    for _, z, p, visible in found:
        torch.testing.assert_close(p, torch.softmax(z.masked_fill(~visible, -torch.inf), -1))


def test_observers_see_no_recomputation_and_know_who_learns():
    model, seen = load("lab/llama-50k").train(), []
    models.checkpoint_activations(model)
    undo = observe(model, lambda s: seen.append(s.learning), "x")
    model(input_ids=IDS).logits.sum().backward()
    assert seen == [True, True]
    with torch.no_grad():
        model(input_ids=IDS)
    assert seen == [True, True, False, False]
    undo()
    model(input_ids=IDS)
    assert len(seen) == 4


def test_two_observers_and_maps_come_and_go():
    model, a, b = load("lab/llama-50k"), [], []
    first, second = observe(model, a.append, "x"), observe(model, b.append, "x")
    scale_logits(model, 0.5, "x")
    first()
    with torch.no_grad():
        scaled = model(input_ids=IDS).logits
    assert (len(a), len(b)) == (0, 2)
    second()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, scaled)


def test_copies_are_independent():
    model = load("lab/llama-50k")
    map_logits(model, same, "x")
    twin = copy.deepcopy(model)
    map_logits(twin, lambda z: 0 * z, "x")
    with torch.no_grad():
        assert not torch.allclose(twin(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-9)
    assert len(getattr(attentions(model, "x")[0], ATTRIBUTE).logits) == 1


def test_dropout_is_the_modules_own():
    model = load("lab/llama-50k").train()
    for m in attentions(model, "x"):
        m.attention_dropout = 0.5
    map_logits(model, same, "x")
    torch.manual_seed(0)
    one, two = model(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert not torch.equal(one, two)
    assert torch.equal(model.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_half_precision_maps_in_float32():
    model, kinds = models.load("lab/llama-50k").model.to(torch.bfloat16), []
    map_logits(model, lambda z: (kinds.append(z.dtype), z)[1], "x")
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    assert set(kinds) == {torch.float32}


def test_layers_of_the_families():
    expected = {"lab/llama-50k": [3, 1, 2, 1], "lab/gpt2-1m": [1, 1, 1, 1], "lab/bert-1m": [3, 1, 1, 1]}
    for name, counts in expected.items():
        for block in models.blocks(models.load(name).model):
            found = layers(block, "x")
            assert [len(found[g]) for g in ("qkv", "proj", "fc1", "fc2")] == counts
            assert len({id(p.module) for g in found.values() for p in g}) == sum(counts)
    block = models.blocks(models.load("lab/bert-1m").model)[0]
    assert layers(block, "x")["proj"][0].module is block.attention.output.dense
    assert layers(block, "x")["fc2"][0].module is block.output.dense


def test_refusals():
    model = load("lab/llama-50k")
    for m in attentions(model, "x"):
        m.config = copy.copy(m.config)
        m.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UsageError, match="flex_attention"):
        map_logits(model, same, "x")
    neox = transformers.GPTNeoXConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UsageError, match="no attention"):
        observe(transformers.GPTNeoXForCausalLM(neox), print, "x")
