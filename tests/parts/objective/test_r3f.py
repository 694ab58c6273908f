"""Oracle of objective/r3f: the two divergences written out in float64 numpy; what is noised, and how.

Bugs it is meant to catch: one direction of the divergence only, a detached branch, other dropout masks in the
second pass, the same noise at every call, noise outside its bound, weights of targets forgotten.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.batch import Labels, Tokens
from metier.core.errors import UsageError
from metier.core.lossmodule import LossModule, batch_type
from metier.testing import check_part
from metier.testing._tiny import layout

ROWS = layout([[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], label=[1, 0])


def built(**options):
    return part.build("objective", {"r3f": options}).obj


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(a, b):
    p, q = softmax(a), softmax(b)
    return (p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)


def scorer(clean, noised, seen=None):
    """A forward that gives ``noised`` when the embeddings are mapped."""

    def forward(_, embed=None):
        if embed is None:
            return clean
        if seen is not None:
            seen.append(embed(torch.zeros(50, 40, 8)))
        return noised

    return forward


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(6, 9, dtype=torch.float64) * 3, torch.randn(6, 9, dtype=torch.float64) * 3


def test_contract():
    check_part("objective/r3f")


def test_tokens(logits):
    a, b = logits
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    clean = Tokens(-torch.arange(1.0, 7, dtype=torch.float64), weights, torch.zeros(6), None, a, None)
    loss, metrics = built(weight=0.7)(scorer(clean, replace(clean, logits=b)), ROWS)
    expected = (np.arange(1.0, 7) + 0.7 * divergence(a.numpy(), b.numpy())) * weights.numpy()
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["divergence"].numpy(), divergence(a.numpy(), b.numpy()) * weights.numpy(), rtol=1e-12)


def test_classes(logits):
    a, b = logits
    label = torch.tensor([0, 8, 3, 3, 1, 2])
    objective = built(over="classes", weight=2.0)
    assert batch_type(objective) is Labels
    loss, _ = objective(scorer(Labels(a, label), Labels(b, label)), ROWS)
    nll = -np.log(softmax(a.numpy())[np.arange(6), label.numpy()])
    np.testing.assert_allclose(loss.numpy(), nll + 2 * divergence(a.numpy(), b.numpy()), rtol=1e-12)


def test_gradient_flows_through_both_passes(logits):
    a, b = (x.requires_grad_() for x in logits)
    clean = Tokens(torch.zeros(6, dtype=torch.float64), torch.ones(6), torch.zeros(6), None, a, None)
    built(weight=1.0)(scorer(clean, replace(clean, logits=b)), ROWS)[0].sum().backward()
    for x, other in ((a, b), (b, a)):
        z, fixed, step = x.detach().numpy(), other.detach().numpy(), 1e-6
        bumped = [z.copy(), z.copy()]
        bumped[0][2, 3] += step
        bumped[1][2, 3] -= step
        slope = (divergence(bumped[0], fixed).sum() - divergence(bumped[1], fixed).sum()) / (2 * step)
        assert x.grad[2, 3].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_noise(noise, logits):
    clean, seen = Tokens(torch.zeros(6), torch.ones(6), torch.zeros(6), None, logits[0], None), []
    objective = built(scale=0.01, noise=noise)
    for _ in range(2):
        objective(scorer(clean, clean, seen), ROWS)
    first, second = seen
    assert not torch.equal(first, second)
    assert abs(first.mean()) < 4 * 0.01 / 16000**0.5
    if noise == "uniform":
        assert first.abs().max() <= 0.01
        assert first.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.05)
    else:
        assert first.std().item() == pytest.approx(0.01, rel=0.05)


def test_half_precision_embeddings_are_refused():
    with pytest.raises(UsageError, match="bfloat16"):
        built().perturb(torch.zeros(1, 2, 3, dtype=torch.bfloat16), 0)


class Dropout(torch.nn.Module):
    """Language-model scores from an embedding table behind dropout, in a form whose masks can be compared."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __call__(self, batch, embed=None):
        e = torch.ones(2, 6, 9)
        e = embed(e) if embed else e
        dropped = torch.nn.functional.dropout(e, 0.5)
        self.masks.append(dropped == 0)
        z = dropped.reshape(12, 9)
        return Tokens(z[:, 0], torch.ones(12), torch.zeros(12), None, z, None)


def test_both_passes_use_the_same_dropout_masks_and_the_next_call_others():
    forward, objective = Dropout(), built(scale=1e-5)
    torch.manual_seed(0)
    objective(forward, ROWS)
    objective(forward, ROWS)
    a, b, c, d = forward.masks
    assert torch.equal(a, b)
    assert torch.equal(c, d)
    assert not torch.equal(a, c)


def test_on_a_real_model_the_divergence_is_second_order_in_the_noise():
    """Twice the noise, four times the divergence: the noise reaches the logits, and nothing else differs."""
    bundle, found = models.load("lab/llama-50k", seed=1), []
    model = bundle.model.double()
    for scale in (1e-3, 2e-3):
        module = LossModule(model, part.build("objective", {"r3f": {"scale": scale}}))
        torch.manual_seed(0)
        total, units, metrics = module(ROWS)
        found.append(float(metrics["divergence"]))
        assert units == len(ROWS.target)
        assert torch.isfinite(total)
    assert found[1] / found[0] == pytest.approx(4, rel=0.1)


def test_needs_are_declared():
    assert not isinstance(built(), partial)
    assert part.build("objective", "r3f").card.needs == {"logits"}
