"""Oracle of core/segments: the dense mask, position by position, and SDPA's scores and gradients under it.

Bugs it is meant to catch: an answer that sees its sibling or another group's prompt, a mask that is off by the prompt's
length, a forgotten window, segments of a branch that is torn apart, keys of one row used in another, padding that is not a
number, segments that are never used.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from metier.core import kernel, models, segments
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.forward import masking
from metier.core.scores import token_logps

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": 97, "pad_token_id": 3, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 3}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 3, "head_dim": 8,
                                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0}),
}  # fmt: skip


def ids(n, seed):
    return np.random.default_rng(seed).integers(5, 95, n).astype(np.int32)


def answered(prompt, *answers):
    own = tuple(ids(n, 10 * prompt + k) for k, n in enumerate(answers, 1))
    return Item(ids(prompt, prompt), np.zeros(prompt, bool), own, tuple(np.ones(n, bool) for n in answers), "x")


def text(n):
    return Item(ids(n, n), np.ones(n, bool), id="x")


LAYOUTS = {
    "groups": lambda: collate([answered(6, 5, 7), answered(2, 1, 3, 2), answered(9, 4, 2)], pad_id=3, rows=[[1, 0], [2]]),
    "texts": lambda: collate([text(n) for n in (12, 5, 9, 2, 7)], pad_id=3, rows=[[0, 3, 1], [2, 4]]),
    "a group a row": lambda: collate([answered(5, 4, 2), answered(3, 1, 6)], pad_id=3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(segments, "WORTH", 0)


def mask_of(found, rows, columns):
    """What the segments let each position see, as the dense mask says it."""
    starts = np.cumsum([0] + [s.length for s in found])
    mask = torch.zeros(rows * columns, rows * columns, dtype=torch.bool)
    for start, s in zip(starts, found, strict=False):
        keys = list(range(start, start + s.length))
        before = [] if s.prompt is None else list(range(starts[s.prompt], starts[s.prompt] + found[s.prompt].length))
        block = torch.ones(s.length, s.length, dtype=torch.bool).tril() if s.mask is None else s.mask
        for i, own in enumerate(keys):
            mask[own, torch.tensor(before + keys)[block[i]]] = True
    whole = mask.view(rows, columns, rows, columns)
    assert all(not whole[a, :, b].any() for a in range(rows) for b in range(rows) if a != b)
    return torch.stack([whole[r, :, r] for r in range(rows)])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_segments_say_what_the_mask_says(name, window):
    layout = LAYOUTS[name]()
    expected = layout.visible()
    if window is not None:
        p = layout.position_ids
        expected &= p[:, :, None] - p[:, None, :] < window
    real = layout.group > 0
    made = mask_of(segments.segments(layout, window), *layout.group.shape)
    assert torch.equal(made[real], expected[real])


def tiny(name):
    import transformers

    torch.manual_seed(1)
    kind, options = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SMALL, **options}))
    return model.double().eval()


def graded(model, layout, attention):
    model.zero_grad()
    assert kernel._set(model, attention) is None
    logps = token_logps(model, layout)
    (logps * torch.linspace(-1, 2, len(logps), dtype=torch.float64)).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", LAYOUTS)
def test_scores_and_gradients_are_those_under_the_mask(name, rows, monkeypatch):
    model, layout, calls = tiny(name), LAYOUTS[rows](), []
    compute = segments._attention
    monkeypatch.setattr(segments, "_attention", lambda *args: calls.append(1) or compute(*args))
    expected, slopes = graded(model, layout, "sdpa")
    assert not calls
    found, own = graded(model, layout, "segments")
    used = [s for s in segments.segments(layout) if not s.padding]
    assert len(calls) == len(used) * model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # most norms compute in float32 even here
    for parameter, slope in slopes.items():
        assert (own[parameter] - slope).abs().max() <= 1e-5 * slope.abs().max() + 1e-12, parameter


def test_recomputed_blocks_use_them_too(monkeypatch):
    model, layout, calls = tiny("llama"), LAYOUTS["texts"](), []
    expected, slopes = graded(model, layout, "sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    compute = segments._attention
    monkeypatch.setattr(segments, "_attention", lambda *args: calls.append(1) or compute(*args))
    found, own = graded(model, layout, "segments")
    assert len(calls) == 2 * 5 * 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for parameter, slope in slopes.items():
        assert (own[parameter] - slope).abs().max() <= 1e-5 * slope.abs().max() + 1e-12, parameter


def test_a_copy_of_the_mask_still_tells_all():
    model, layout = tiny("llama"), LAYOUTS["groups"]()
    expected = graded(model, layout, "sdpa")[0]
    kernel._set(model, "segments")
    mask = masking(model, layout)["attention_mask"]
    assert getattr(mask, segments.ATTRIBUTE)
    backbone = models.backbone(model)
    states = backbone(input_ids=layout.input_ids, attention_mask=mask.clone(), position_ids=layout.position_ids, use_cache=False)
    logits = model.lm_head(states.last_hidden_state)[layout.row, layout.col]
    found = torch.log_softmax(logits, -1).gather(1, layout.target[:, None])[:, 0]
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-6)


def test_torn_branches_have_no_segments():
    layout = LAYOUTS["groups"]()
    torn = layout.branch.clone()
    place = (torn[0] == 1).nonzero()[0, 0]
    torn[0, place], torn[0, place + 1 : place + 2] = 2, 1
    assert segments.segments(replace(layout, branch=torn)) is None


def test_they_are_used_where_they_pay(monkeypatch):
    monkeypatch.undo()
    one, two = (collate([answered(190, *own)], pad_id=3) for own in ([60], [60, 60]))
    many = collate([text(n) for n in (60, 50, 70, 40)], pad_id=3, rows=[[0, 1, 2, 3]])
    assert segments.pairs(segments.segments(two)) == 190**2 + 2 * 60 * 250
    assert segments.pairs(segments.segments(many)) == 60**2 + 50**2 + 70**2 + 40**2
    for layout, used in ((one, False), (two, True), (many, True)):
        assert hasattr(segments.attach(layout.visible().unsqueeze(1), layout), segments.ATTRIBUTE) == used
