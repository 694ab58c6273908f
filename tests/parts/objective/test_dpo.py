"""Oracle of objective/dpo: equation 7 in float64 numpy, and trl's ``sigmoid`` loss recomputed by hand.

Bugs it is meant to catch: chosen and rejected or policy and reference exchanged, beta forgotten in a metric, lengths used.
"""

import numpy as np
import pytest
import torch
from _referenced import check_like_trl

from metier.core import models, part
from metier.core.batch import Pairs
from metier.core.data.collate import collate
from metier.core.data.encode import Item
from metier.core.errors import UsageError
from metier.core.lossmodule import LossModule
from metier.core.scores import reference_scorer
from metier.testing import check_part


def dpo(batch, **options):
    return part.build("objective", {"dpo": options}).obj(batch)


def pairs(chosen, rejected, ref_chosen, ref_rejected):
    values = [torch.tensor(v, dtype=torch.float64) for v in (chosen, rejected, ref_chosen, ref_rejected)]
    lengths = torch.tensor([7.0] * len(chosen)), torch.tensor([2.0] * len(chosen))
    return Pairs(values[0], values[1], *lengths, values[2], values[3])


RNG = np.random.default_rng(0)
RANDOM = [(-40 * RNG.random(6)).tolist() for _ in range(4)]


def test_contract():
    check_part("objective/dpo")


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_equation_7(beta):
    w, l, rw, rl = (np.array(v) for v in RANDOM)  # noqa: E741
    loss, _ = dpo(pairs(*RANDOM), beta=beta)
    np.testing.assert_allclose(loss.numpy(), np.log1p(np.exp(-beta * ((w - rw) - (l - rl)))), rtol=1e-10)


def test_as_trl_writes_it():
    """``-logsigmoid(beta * ((pi_w - pi_l) - (ref_w - ref_l)))``; rewards ``beta (pi - ref)``; numbers worked out by hand."""
    loss, metrics = dpo(pairs([-10.0, -20.0], [-12.0, -15.0], [-11.0, -18.0], [-11.0, -18.0]), beta=0.5)
    # logits (2 - 0) / 2 = 1 and (-5 - 0) / 2 = -2.5
    np.testing.assert_allclose(loss.numpy(), [0.31326168751822286, 2.5788897342925496], rtol=1e-12)
    assert metrics["chosen_reward"].tolist() == [0.5, -1.0]
    assert metrics["rejected_reward"].tolist() == [-0.5, 1.5]
    assert metrics["margin"].tolist() == [1.0, -2.5]
    assert metrics["accuracy"].tolist() == [1.0, 0.0]


def test_gradient():
    """``beta * sigma(-margin)``: up for the chosen answer, down for the rejected, most where the order is wrong."""
    batch = pairs(*RANDOM)
    batch.chosen_logps.requires_grad_()
    batch.rejected_logps.requires_grad_()
    loss, metrics = dpo(batch, beta=0.3)
    loss.sum().backward()
    weight = 0.3 / (1 + np.exp(metrics["margin"].detach().numpy()))
    np.testing.assert_allclose(batch.chosen_logps.grad.numpy(), -weight, rtol=1e-10)
    np.testing.assert_allclose(batch.rejected_logps.grad.numpy(), weight, rtol=1e-10)


def test_limits():
    same = pairs([-3.0], [-9.0], [-3.0], [-9.0])
    assert dpo(same)[0].item() == pytest.approx(np.log(2))  # at the start of training
    assert dpo(pairs([0.0], [-1e5], [-1e5], [0.0]), beta=1.0)[0].item() == 0.0
    assert dpo(pairs([-1e5], [0.0], [0.0], [-1e5]), beta=1.0)[0].item() == pytest.approx(2e5)


def test_constants_of_the_reference_cancel():
    a = dpo(pairs(*RANDOM))[0]
    b = dpo(pairs(RANDOM[0], RANDOM[1], [v + 7 for v in RANDOM[2]], [v + 7 for v in RANDOM[3]]))[0]
    torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


def test_population_labels_lead_to_the_optimum_of_the_regularized_reward():
    """With the Bradley–Terry probabilities of all pairs, gradient descent ends at ``softmax(log μ + r*/β)``, per prompt."""
    rng, beta, answers = np.random.default_rng(1), 0.5, 5
    ref = torch.log_softmax(torch.tensor(rng.normal(size=(3, answers))), 1)
    reward = torch.tensor(rng.normal(size=(3, answers)))
    i, j = (k.flatten() for k in torch.meshgrid(torch.arange(answers), torch.arange(answers), indexing="ij"))
    weight = torch.sigmoid(reward[:, i] - reward[:, j]).flatten()
    table, n = ref.clone().requires_grad_(), torch.ones(3 * answers**2)
    for _ in range(400):
        logp = table.log_softmax(1)
        batch = Pairs(logp[:, i].flatten(), logp[:, j].flatten(), n, n, ref[:, i].flatten(), ref[:, j].flatten())
        (slope,) = torch.autograd.grad((weight * dpo(batch, beta=beta)[0]).sum(), table)
        table.data -= 2.0 * slope
    best = torch.softmax(ref + reward / beta, 1)
    assert (table.detach().softmax(1) - best).abs().sum(1).max() / 2 < 1e-5


def test_the_start_in_value_and_slope():
    """``log 2`` and ``∓β/2`` for any beta; ties of the implicit rewards count one half."""
    for beta in (0.01, 0.1, 5.0):
        batch = pairs([-3.0, -50.0], [-9.0, -1.0], [-3.0, -50.0], [-9.0, -1.0])
        batch.chosen_logps.requires_grad_()
        batch.rejected_logps.requires_grad_()
        loss, metrics = dpo(batch, beta=beta)
        loss.sum().backward()
        np.testing.assert_allclose(loss.detach(), np.log(2), rtol=1e-12)
        np.testing.assert_allclose(batch.chosen_logps.grad, -beta / 2)
        np.testing.assert_allclose(batch.rejected_logps.grad, beta / 2)
        assert metrics["accuracy"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_by_trl(beta):
    check_like_trl("dpo", "sigmoid", options={"beta": beta}, beta=beta)


def test_default_and_range_of_beta():
    assert torch.equal(dpo(pairs(*RANDOM))[0], dpo(pairs(*RANDOM), beta=0.1)[0])
    with pytest.raises(UsageError, match="beta"):
        dpo(pairs(*RANDOM), beta=0.0)


def test_on_models():
    """From token ids to the loss, against log-probabilities of each whole sequence computed alone."""
    policy, frozen = (models.load("lab/llama-50k", seed=s).model.double() for s in (1, 2))
    made = [([5, 6], [7, 8, 9], [10]), ([11, 12, 13], [14], [15, 16])]
    items = [
        Item(np.array(p), np.zeros(len(p), bool), (np.array(a), np.array(b)), (np.ones(len(a), bool), np.ones(len(b), bool)), "x")
        for p, a, b in made
    ]
    module = LossModule(policy, part.build("objective", {"dpo": {"beta": 0.7}}), reference_scorer(frozen, torch.no_grad))
    total, units, metrics = module(collate(items, pad_id=3))

    def logp(model, prompt, answer):
        z = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1).detach().numpy()
        return sum(z[len(prompt) - 1 + i, t] for i, t in enumerate(answer))

    margins = [0.7 * (logp(policy, p, a) - logp(frozen, p, a) - logp(policy, p, b) + logp(frozen, p, b)) for p, a, b in made]
    assert units == 2
    np.testing.assert_allclose(float(total.detach()), np.log1p(np.exp(-np.array(margins))).sum(), rtol=1e-6)
    np.testing.assert_allclose(float(metrics["margin"]), sum(margins), rtol=1e-5)
