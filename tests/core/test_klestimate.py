"""KL estimates: against the sum over every answer there is, against whole-sequence forward passes, and against each other.

Bugs it is meant to catch: the KL the other way round, prefixes of another answer, the last token left out, an adapter not switched off.
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from metier.core import models
from metier.core.klestimate import answer_stats
from metier.core.sample import sample

V, END, STEPS = 5, 0, 3
"""Vocabulary, end token, longest answer of the small world that can be summed out."""


def small(seed, scale=4.0):
    """A model over five tokens with strong preferences."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, eos_token_id=END,
        max_position_embeddings=32, use_cache=False, tie_word_embeddings=False, pad_token_id=V - 1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.ndim > 1 else None
    return model


def every_answer():
    """All answers of at most STEPS tokens: the end token last, or cut."""
    for n in range(STEPS):
        for head in itertools.product(range(1, V), repeat=n):
            yield (*head, END)
    yield from itertools.product(range(1, V), repeat=STEPS)


def logps(model, prompt, answer):
    with torch.no_grad():
        z = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return z.numpy()


def exact_kl(policy, reference, prompt):
    total = mass = 0.0
    for y in every_answer():
        p, q = (sum(logps(m, prompt, y)[t, token] for t, token in enumerate(y)) for m in (policy, reference))
        total, mass = total + np.exp(p) * (p - q), mass + np.exp(p)
    assert mass == pytest.approx(1)
    return total


PROMPT = [3, 1, 2]


def test_both_estimates_have_the_exact_kl_as_mean_and_rao_blackwell_less_variance():
    policy, reference = small(1), small(2)
    kl = exact_kl(policy, reference, PROMPT)
    fake = type("T", (), {"pad_token_id": V - 1, "decode": lambda self, ids, skip_special_tokens: ""})()
    answers = sample(policy, fake, [np.array(PROMPT)], number=3000, max_new_tokens=STEPS, seed=4, end_ids=[END])
    answers = [answers[0][k : k + 10] for k in range(0, 3000, 10)]
    found = answer_stats(policy, reference, [np.array(PROMPT)] * 300, answers, V - 1)
    for name in ("kl", "kl_mc"):
        values = found[name].ravel()
        assert abs(values.mean() - kl) < 4 * values.std() / np.sqrt(len(values)), name
    assert found["kl"].var() < 0.5 * found["kl_mc"].var()
    assert kl > 0.05


def test_rao_blackwell_summed_over_all_answers_is_the_exact_kl():
    policy, reference = small(5), small(6)
    every = list(every_answer())
    found = answer_stats(policy, reference, [np.array(PROMPT)], [[np.array(y) for y in every]], V - 1)
    p = np.exp(found["logps"][0])
    kl = exact_kl(policy, reference, PROMPT)
    assert (p * found["kl"][0]).sum() == pytest.approx(kl, rel=1e-9)
    assert (p * found["kl_mc"][0]).sum() == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("name", ["lab/llama-50k", "lab/gpt2-1m", "lab/gemma-1m"])
@pytest.mark.parametrize("split", [{}, {"batch_tokens": 1, "chunk_bytes": 40_000}], ids=["whole", "split"])
def test_against_whole_sequences(name, split):
    """Ragged prompts and answers, an empty answer among them, one forward pass each."""
    policy, reference = (models.load(name, seed=s).model for s in (1, 2))
    policy.train()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 2000, n).astype(np.int32) for n in (4, 1, 7)]
    answers = [[rng.integers(5, 2000, n).astype(np.int32) for n in row] for row in ((3, 5), (1, 0), (6, 2))]
    found = answer_stats(policy, reference, prompts, answers, 3, **split)
    assert policy.training
    policy.eval()
    for i, k in itertools.product(range(3), range(2)):
        y = answers[i][k]
        p, q = (logps(m, prompts[i], y).astype(np.float64) for m in (policy, reference))
        at = np.arange(len(y)), y
        assert found["logps"][i, k] == pytest.approx(p[at].sum(), abs=2e-4)
        assert found["ref_logps"][i, k] == pytest.approx(q[at].sum(), abs=2e-4)
        assert found["kl"][i, k] == pytest.approx((np.exp(p) * (p - q)).sum(), abs=2e-4)
        assert found["kl_mc"][i, k] == pytest.approx((p[at] - q[at]).sum(), abs=4e-4)
        assert found["length"][i, k] == len(y)


def test_an_adapter_switched_off_is_the_reference():
    from metier.core.adapt import attach
    from metier.core.part import build

    model, base = (models.load("lab/llama-50k", seed=1).model for _ in range(2))
    attached = attach(model, build("adapter", "lora"))
    with torch.no_grad():
        for a in attached.adapters.values():
            for value in a.own_state().values():
                nn.init.normal_(value, std=0.3)
    ids = [np.array([5, 6, 7])], [[np.array([8, 9]), np.array([10])]]
    found, other = (answer_stats(attached.model, r, *ids, 3) for r in (attached.disabled, base))
    for name in found:
        np.testing.assert_allclose(found[name], other[name], rtol=1e-5, atol=1e-6)
    assert (found["kl"] > 1e-4).all()
    same = answer_stats(attached.model, contextlib.nullcontext, *ids, 3)
    np.testing.assert_allclose(same["kl"], 0, atol=1e-6)


def test_bad_shapes_are_refused():
    model = models.load("lab/llama-50k").model
    with pytest.raises(ValueError, match="same number"):
        answer_stats(model, model, [np.array([5])] * 2, [[np.array([6])], []], 3)
    with pytest.raises(ValueError, match="empty prompt"):
        answer_stats(model, model, [np.array([], np.int32)], [[np.array([6])]], 3)
