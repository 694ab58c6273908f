"""Oracle of objective/lm: cross-entropy written out in float64 numpy, from logits.

Bugs it is meant to catch: the sign, weights forgotten or applied to the count, a mean where a loss per token is due.
"""

import numpy as np
import pytest
import torch

from metier.core import models, part
from metier.core.batch import Tokens
from metier.core.lossmodule import LossModule
from metier.testing import check_part
from metier.testing._tiny import layout


def lm(batch):
    return part.build("objective", "lm").obj(batch)


def tokens(logps, weights):
    return Tokens(torch.tensor(logps).double(), torch.tensor(weights).double(), torch.zeros(len(logps)))


def test_contract():
    check_part("objective/lm")


def test_by_hand():
    assert lm(tokens([-1.0, -2.0, -0.5], [1.0, 0.5, 0.0])).tolist() == [1.0, 1.0, 0.0]


def test_gradient_raises_the_likelihood_in_proportion_to_the_weight():
    batch = tokens([-1.0, -2.0, -0.5], [1.0, 0.5, 0.0])
    batch.logps.requires_grad_()
    lm(batch).sum().backward()
    assert batch.logps.grad.tolist() == [-1.0, -0.5, 0.0]


def test_on_a_model():
    """Mean over the targets of ``log sum exp z - z_y``; a model that knows nothing is at log V."""
    model = models.load("lab/llama-50k", seed=1).model.double()
    rows = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [3, 4]]
    total, units, metrics = LossModule(model, part.build("objective", "lm"))(layout(rows))
    expected = []
    for r in rows:
        z = model(input_ids=torch.tensor([r])).logits[0].detach().numpy()
        expected += [np.log(np.exp(z[i]).sum()) - z[i][r[i + 1]] for i in range(len(r) - 1)]
    assert units == len(expected) == 9
    assert metrics == {}
    np.testing.assert_allclose(float(total.detach()), sum(expected), rtol=1e-6)
    assert float(total.detach()) / units == pytest.approx(np.log(2048), rel=0.02)
