"""Oracle of core/forward and core/layout: whatever shares a row must be computed as if it stood in a row of its own.

Bugs it is meant to catch: a branch that sees its sibling, positions that do not continue from the prompt, a sliding window
counted in the row instead of the sequence, padding that is seen, masks that a model silently ignores.
"""

import numpy as np
import pytest
import torch

from metier.core import models
from metier.core.batch import Tokens
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.forward import hidden_states, is_causal, takes_groups
from metier.core.scores import score, token_logps

VOCABULARY = 97
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": VOCABULARY, "pad_token_id": 3, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
FAMILIES = ["lab/llama-50k", "lab/qwen2-1m", "lab/gemma-1m", "lab/gpt2-1m", "mistral", "gemma3", "qwen2 sliding"]


def tiny(kind, attention="sdpa", **more):
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, kind)(**{**SMALL, **more})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def load(name, attention="sdpa"):
    """A float64 model without dropout. The window of the sliding ones is shorter than the sequences."""
    made = {
        "mistral": lambda: tiny("MistralConfig", attention, sliding_window=3),
        "gemma3": lambda: tiny(
            "Gemma3TextConfig", attention, sliding_window=3, head_dim=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "qwen2 sliding": lambda: tiny("Qwen2Config", attention, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    }  # fmt: skip
    model = made[name]() if name in made else models.load(name, seed=1).model
    return model.double().eval()


def ids(n, seed):
    return np.random.default_rng(seed).integers(5, 95, n).astype(np.int32)


def answered(prompt, *answers):
    zeros, ones = np.zeros(len(prompt), bool), tuple(np.ones(len(a), bool) for a in answers)
    return Item(prompt, zeros, answers, ones, "x")


def text(tokens):
    return Item(tokens, np.ones(len(tokens), bool), id="x")


def apart(item):
    """The answers of an item in rows of their own, the prompt repeated."""
    return [
        Item(np.concatenate([item.prompt, a]), np.concatenate([item.prompt_loss, m]), id="x")
        for a, m in zip(item.answers, item.answer_loss, strict=True)
    ]


def graded(model, layout):
    """Log-probabilities, and the gradient of all parameters for unequal weights of the targets."""
    model.zero_grad(set_to_none=True)
    logps = token_logps(model, layout)
    (logps * torch.linspace(-1, 2, len(logps), dtype=torch.float64)).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, one, other):
    """Equal to rounding. Norms of most families compute in float32 even here; GPT-2's do not."""
    tolerance = 1e-12 if model.config.model_type == "gpt2" else 1e-5
    (a, ga), (b, gb) = graded(model, one), graded(model, other)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert ga.keys() == gb.keys()
    assert ga
    for name in ga:
        bound = tolerance * float(gb[name].abs().max()) + 1e-12
        assert (ga[name] - gb[name]).abs().max() <= bound, name


GROUPS = [
    answered(ids(6, 0), ids(5, 1), ids(7, 2)),
    answered(ids(2, 3), ids(1, 4), ids(3, 5), ids(2, 6)),
    answered(ids(9, 7), ids(4, 8), ids(4, 9)),
]
TEXTS = [text(ids(n, n)) for n in (12, 5, 9, 2, 7)]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_once_equals_separate_rows(name):
    model = load(name)
    separate = [row for item in GROUPS for row in apart(item)]
    assert_same(model, collate(GROUPS, pad_id=3), collate(separate, pad_id=3))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_padded(name):
    model = load(name)
    packed = collate(TEXTS, pad_id=3, rows=[[0, 2], [3, 1, 4]])
    assert packed.input_ids.shape == (2, 21)
    assert_same(model, packed, collate(TEXTS, pad_id=3))
    groups = collate(GROUPS, pad_id=3, rows=[[1, 0], [2]])
    assert_same(model, groups, collate(GROUPS, pad_id=3))


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_does_not_matter(name):
    model = load(name)
    together = token_logps(model, collate(TEXTS, pad_id=3)).detach()
    alone = torch.cat([token_logps(model, collate([t], pad_id=77)).detach() for t in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_plain_attention_takes_the_masks_too(name):
    eager, sdpa = load(name, "eager"), load(name)
    eager.load_state_dict(sdpa.state_dict())
    rows = collate(GROUPS, pad_id=3, rows=[[1, 0], [2]])
    torch.testing.assert_close(token_logps(eager, rows), token_logps(sdpa, rows), rtol=0, atol=1e-6)
    assert_same(eager, rows, collate([r for i in GROUPS for r in apart(i)], pad_id=3))


def test_windows_in_these_models_do_restrict():
    """Otherwise the tests above could not fail."""
    for name in ("mistral", "gemma3", "qwen2 sliding"):
        near, far = load(name), load(name)
        far.config.sliding_window = 1000
        for m in far.modules():
            if getattr(m, "sliding_window", None):
                m.sliding_window = 1000
        rows = collate([TEXTS[0]], pad_id=3)
        assert not torch.allclose(token_logps(near, rows), token_logps(far, rows), atol=1e-4)


def test_models_that_cannot_keep_sequences_apart_are_refused():
    model = tiny("Qwen2Config")
    model.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    for rows in (collate(TEXTS, pad_id=3, rows=[[0, 1], [2, 3, 4]]), collate(GROUPS, pad_id=3)):
        with pytest.raises(UsageError, match="linear_attention"):
            token_logps(model, rows)
    bert = models.load("lab/bert-1m", task="classify", seed=1).model
    with pytest.raises(UsageError, match=r"data\.packed"):
        hidden_states(bert, collate(TEXTS, pad_id=3, rows=[[0, 1], [2, 3, 4]]))
    model = tiny("Qwen2Config")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="flash_attention_2"):
        token_logps(model, collate(GROUPS, pad_id=3))


def test_why_sequences_may_not_share_a_row_is_said():
    model = tiny("Qwen2Config")
    assert takes_groups(model) is None
    for key, value, reason in (
        ("layer_types", ["chunked_attention", "full_attention", "full_attention"], "chunked_attention layers"),
        ("layer_types", ["sliding_attention", "full_attention", "full_attention"], "unknown width"),
        ("_attn_implementation", "flash_attention_2", "attention flash_attention_2"),
        ("attention_window_size", 7, "attention_window_size counts along the row"),
    ):
        changed = tiny("Qwen2Config")
        setattr(changed.config, key, value)
        assert reason in takes_groups(changed), key
    assert "what comes after" in takes_groups(models.load("lab/bert-1m", seed=1).model)
    for name in FAMILIES:
        assert takes_groups(load(name)) is None, name


def test_encoders_are_told_from_decoders():
    import transformers

    for kind, causal in (("BertConfig", False), ("XLMRobertaConfig", False), ("ModernBertConfig", False), ("MPNetConfig", False),
                         ("LlamaConfig", True), ("GPT2Config", True), ("Gemma3TextConfig", True)):  # fmt: skip
        model = torch.nn.Module()
        model.config = getattr(transformers, kind)()
        assert is_causal(model) is causal, kind


@pytest.mark.parametrize("name", ["lab/llama-50k", "lab/gemma-1m", "lab/gpt2-1m", "gemma3"])
def test_embeddings_can_be_mapped(name):
    model = load(name)
    rows = collate(GROUPS, pad_id=3)
    seen = []

    def embed(e):
        seen.append(tuple(e.shape))
        return e

    plain = score(model, rows, Tokens)
    torch.testing.assert_close(score(model, rows, Tokens, embed=embed).logps, plain.logps, rtol=0, atol=1e-12)
    assert seen == [(*rows.input_ids.shape, models.embeddings(model).weight.shape[1])]
    assert not torch.allclose(score(model, rows, Tokens, embed=lambda e: e * 2 + 1).logps, plain.logps)


def test_visible_by_hand():
    """Prompt a b, answers c and d e; then padding."""
    layout = collate([answered(ids(2, 0), ids(1, 1), ids(2, 2)), answered(ids(4, 3), ids(1, 4), ids(1, 5))], pad_id=3)
    assert layout.visible()[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert not layout.plain
    assert layout.real_tokens == 11


def test_plain_layouts():
    assert collate(TEXTS, pad_id=3).plain
    assert not collate(TEXTS, pad_id=3, rows=[[0, 1], [2, 3, 4]]).plain
    assert not collate([answered(ids(2, 0), ids(2, 1))], pad_id=3).plain
