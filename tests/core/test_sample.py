"""Sampling: transformers' greedy search, the model's own probabilities, and the same answers however the work is split.

Bugs it is meant to catch: a position or mask off by one under left padding, a cache row of another prompt, tokens drawn after the end,
temperature applied twice, top-p without the token that crosses it.
"""

import numpy as np
import pytest
import torch
from random_models import prompts, sharp
from scipy import stats

from metier.core import models
from metier.core.errors import UsageError
from metier.core.sample import end_tokens, sample

FAMILIES = ("lab/llama-50k", "lab/gpt2-1m", "lab/qwen2-1m", "lab/gemma-1m")


def same(a, b):
    return all(
        np.array_equal(x.ids, y.ids) and x.ended == y.ended for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_that_of_transformers(name):
    b = sharp(name)
    asked = prompts(3, 9, 5, 1)
    found = sample(b.model, b.tokenizer, asked, number=2, max_new_tokens=10, temperature=0)
    for ids, (first, second) in zip(asked, found, strict=True):
        x = torch.tensor(ids, dtype=torch.long)[None]
        out = b.model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=10, do_sample=False, eos_token_id=end_tokens(b.tokenizer),
            pad_token_id=b.tokenizer.pad_token_id,
        )  # fmt: skip
        assert first.ids.tolist() == second.ids.tolist() == out[0, len(ids) :].tolist()
        assert first.text == b.tokenizer.decode(first.ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_are_those_of_the_whole_text(name):
    b = sharp(name)
    asked = prompts(2, 7)
    for ids, row in zip(asked, sample(b.model, b.tokenizer, asked, number=3, max_new_tokens=8, temperature=0.7), strict=True):
        for answer in row:
            text = torch.tensor([[*ids, *answer.ids]], dtype=torch.long)
            with torch.no_grad():
                z = b.model(input_ids=text).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
            expected = z[torch.arange(len(answer.ids)), torch.tensor(answer.ids, dtype=torch.long)]
            np.testing.assert_allclose(answer.logps, expected.numpy(), atol=2e-4)


def reduced(options):
    """First-token probabilities in float64 numpy, temperature and top-p applied, of a model over 30 words."""
    b = models.load("lab/words-120k", seed=1)
    with torch.no_grad():
        for p in b.model.parameters():
            p.mul_(2.0)
    ids = np.array([4, 9, 30])
    with torch.no_grad():
        z = b.model.eval()(input_ids=torch.tensor(ids)[None]).logits[0, -1].double().numpy()
    p = np.exp((z - z.max()) / options.get("temperature", 1.0))
    p /= p.sum()
    if (top := options.get("top_p", 1.0)) < 1:
        order = np.argsort(-p)
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), top)) + 1]
        q = np.zeros_like(p)
        q[kept] = p[kept]
        p = q / q.sum()
    return b, ids, p


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.6}, {"temperature": 1.5, "top_p": 0.8}], ids=str)
def test_tokens_follow_the_distribution(options):
    b, ids, p = reduced(options)
    n = 6000
    found = sample(b.model, b.tokenizer, [ids], number=n, max_new_tokens=1, seed=7, batch_tokens=10**6, **options)
    seen = np.bincount([a.ids[0] for a in found[0]], minlength=len(p))
    assert seen[p == 0].sum() == 0
    often = p * n >= 8
    groups = np.append(seen[often], seen[~often].sum()), np.append(p[often], p[~often].sum())
    kept = groups[1] > 0
    assert stats.chisquare(groups[0][kept], n * groups[1][kept] / groups[1].sum()).pvalue > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_do_not_depend_on_the_split(name):
    b = sharp(name)
    asked = prompts(3, 8, 8, 1, 5)
    whole = sample(b.model, b.tokenizer, asked, number=3, max_new_tokens=9, seed=5)
    assert same(whole, sample(b.model, b.tokenizer, asked, number=3, max_new_tokens=9, seed=5, batch_tokens=1))
    assert same(whole, sample(b.model, b.tokenizer, asked, number=3, max_new_tokens=9, seed=5, batch_tokens=70))
    assert same([r[:2] for r in whole], sample(b.model, b.tokenizer, asked, number=2, max_new_tokens=9, seed=5))
    assert not same(whole, sample(b.model, b.tokenizer, asked, number=3, max_new_tokens=9, seed=6))
    assert len({tuple(a.ids) for a in whole[0]}) == 3


def test_an_answer_stops_at_its_end_token():
    b = sharp()
    asked = prompts(4, 6, 6)
    free = sample(b.model, b.tokenizer, asked, number=8, max_new_tokens=12, seed=1, end_ids=[2])
    ends = sorted({int(a.ids[4]) for r in free for a in r})[:6]  # tokens that surely occur
    found = sample(b.model, b.tokenizer, asked, number=8, max_new_tokens=12, seed=1, end_ids=ends)
    for r, s in zip(free, found, strict=True):
        for a, c in zip(r, s, strict=True):
            first = next((i for i, t in enumerate(a.ids) if t in ends), None)
            assert c.ended == (first is not None)
            assert c.ids.tolist() == a.ids[: len(a.ids) if first is None else first + 1].tolist()
    assert {a.ended for r in found for a in r} == {True, False}
    assert max(len(a.ids) for r in found for a in r) == 12


def test_what_ends_an_answer():
    chat, plain = models.tokenizer_of("lab/llama-50k"), models.tokenizer_of("lab/words-120k")
    assert {chat.decode([t]) for t in end_tokens(chat)} == {"<|end|>", "<|im_end|>"}
    assert [plain.decode([t]) for t in end_tokens(plain)] == ["<end>"]


def test_modes_and_global_random_numbers_are_left_alone():
    b = models.load("lab/gpt2-1m")
    b.model.train()
    b.model.transformer.h[1].eval()
    modes = [m.training for m in b.model.modules()]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    sample(b.model, b.tokenizer, prompts(3), number=2, max_new_tokens=3)
    assert modes == [m.training for m in b.model.modules()]
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [([[]], {}, "empty"), ([[5]], {"temperature": -1.0}, "temperature"), ([[5]], {"top_p": 0.0}, "top_p")],
    ids=["empty", "temperature", "top-p"],
)
def test_bad_requests(asked, options, message):
    b = models.load("lab/llama-50k")
    with pytest.raises(UsageError, match=message):
        sample(b.model, b.tokenizer, [np.array(p, np.int32) for p in asked], number=1, max_new_tokens=2, **options)


def test_a_model_that_does_not_generate():
    b = models.load("lab/bert-1m")
    with pytest.raises(UsageError, match="generate"):
        sample(b.model, b.tokenizer, prompts(3), number=1, max_new_tokens=2)


def test_the_smallest_set_holds_the_token_that_crosses_it():
    """Two tokens of 0.6 and 0.4: top-p 0.5 keeps the first, 0.7 both; the smallest top-p is greedy."""
    from metier.core.sample import _Drawer

    z = torch.tensor([[0.4, 0.6]], dtype=torch.float64).log().expand(100, 2)
    u = torch.arange(100, dtype=torch.float64) / 100
    shares = [float(_Drawer(1.0, p, 1, 0, ())._draw(z, u).double().mean()) for p in (0.5, 0.6, 0.7, 1.0)]
    assert shares == pytest.approx([1.0, 1.0, 0.6, 0.6])
    b = sharp()
    greedy, narrow = (
        sample(b.model, b.tokenizer, prompts(3, 5), number=1, max_new_tokens=6, **o)
        for o in ({"temperature": 0}, {"top_p": 1e-9})
    )
    assert same(greedy, narrow)


def test_no_answer_is_empty_when_that_is_barred():
    bundle = models.load("lab/llama-50k", seed=3)
    prompts, greedy = [np.array([5, 6], np.int32)], {"number": 1, "max_new_tokens": 4, "temperature": 0}
    likely = int(sample(bundle.model, bundle.tokenizer, prompts, **greedy)[0][0].ids[0])
    (empty,) = sample(bundle.model, bundle.tokenizer, prompts, end_ids=[likely], **greedy)[0]
    assert len(empty.ids) == 1
    (other,) = sample(bundle.model, bundle.tokenizer, prompts, end_ids=[likely], allow_empty=False, **greedy)[0]
    assert other.ids[0] != likely
    assert np.isfinite(other.logps).all()
    assert other.logps[0] < empty.logps[0]  # the model's own, of a token that is less probable
