"""Oracle of objective/classify: cross-entropy with smoothed targets in float64 numpy.

Bugs it is meant to catch: smoothing over C-1 classes, the true class not counted among the smoothed, accuracy of another axis.
"""

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Labels
from metier.core.errors import UsageError
from metier.testing import check_part


def classify(logits, label, **options):
    return part.build("objective", {"classify": options}).obj(Labels(logits, torch.tensor(label)))


@pytest.fixture
def logits():
    return torch.tensor(np.random.default_rng(0).normal(size=(5, 4)) * 2)


def test_contract():
    check_part("objective/classify")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_values(logits, smoothing):
    label = [0, 3, 2, 2, 1]
    z = logits.numpy()
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    q = np.full((5, 4), smoothing / 4)
    q[np.arange(5), label] += 1 - smoothing
    loss, metrics = classify(logits, label, smoothing=smoothing)
    np.testing.assert_allclose(loss.numpy(), -(q * logp).sum(1), rtol=1e-12)
    np.testing.assert_array_equal(metrics["accuracy"].numpy(), (z.argmax(1) == label).astype(float))


def test_gradient_is_softmax_minus_target(logits):
    logits.requires_grad_()
    classify(logits, [0, 3, 2, 2, 1], smoothing=0.2)[0].sum().backward()
    z = logits.detach().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    q = np.full((5, 4), 0.05)
    q[np.arange(5), [0, 3, 2, 2, 1]] += 0.8
    np.testing.assert_allclose(logits.grad.numpy(), p - q, rtol=1e-12, atol=1e-15)


def test_limits():
    assert classify(torch.tensor([[50.0, 0.0]]), [0])[0].item() == pytest.approx(0, abs=1e-12)
    assert classify(torch.zeros(1, 8), [3])[0].item() == pytest.approx(np.log(8))
    # a sure answer cannot reach zero under smoothing: a share of 1/2 of the mass lies on the other class
    assert classify(torch.tensor([[50.0, 0.0]]), [0], smoothing=0.2)[0].item() == pytest.approx(5.0)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, "0.1"])
def test_smoothing_has_a_range(smoothing):
    with pytest.raises(UsageError, match="smoothing"):
        part.build("objective", {"classify": {"smoothing": smoothing}})
