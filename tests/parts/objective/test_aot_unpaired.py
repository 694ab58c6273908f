"""Oracle of objective/aot-unpaired: sorted pairs in numpy, the quantile integral by brute force, trl's own loss.

Bugs it is meant to catch: sorting only one side, sides exchanged, losses put back at the wrong answers, answers dropped when the
counts differ, a mean over answers that is not the integral.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Rated
from metier.testing import check_part


def aot(batch, **options):
    return part.build("objective", {"aot_unpaired": options}).obj(batch)


def rated(good, bad, seed=4):
    rng = np.random.default_rng(seed)
    n = good + bad
    logps, ref = (torch.tensor(-20 * rng.random(n)) for _ in range(2))
    return Rated(logps, torch.full_like(logps, 6.0), torch.tensor(rng.permutation([True] * good + [False] * bad)), ref)


def sides(b):
    ratio, label = (b.logps - b.ref_logps).numpy(), b.label.numpy()
    return np.sort(ratio[label]), np.sort(ratio[~label])


def loss_of(beta, difference):
    return np.log1p(np.exp(-beta * difference))


def test_contract():
    check_part("objective/aot-unpaired")


@pytest.mark.parametrize("beta", [0.1, 1.3])
def test_equal_counts_are_sorted_pairs(beta):
    b = rated(5, 5)
    loss, metrics = aot(b, beta=beta)
    good, bad = sides(b)
    pairs = loss_of(beta, good - bad)
    assert loss.mean().item() == pytest.approx(pairs.mean(), rel=1e-12)
    ratio, label = (b.logps - b.ref_logps).numpy(), b.label.numpy()
    for side, ordered in ((label, good), (~label, bad)):
        np.testing.assert_allclose(loss.numpy()[side], pairs[np.searchsorted(ordered, ratio[side])], rtol=1e-12)
    assert metrics["one_sided"].item() == 0


@pytest.mark.parametrize(("good", "bad"), [(3, 5), (5, 2), (1, 6), (4, 6), (7, 1)])
def test_unequal_counts_integrate_over_quantiles(good, bad):
    """Against the mean over a grid as fine as the least common multiple, on which both quantile functions are constant."""
    b = rated(good, bad)
    loss, _ = aot(b, beta=0.4)
    top, low = sides(b)
    fine = np.lcm(good, bad)
    pairs = loss_of(0.4, np.repeat(top, fine // good) - np.repeat(low, fine // bad))
    assert loss.mean().item() == pytest.approx(pairs.mean(), rel=1e-12)
    ratio, label = (b.logps - b.ref_logps).numpy(), b.label.numpy()
    for side, ordered in ((label, top), (~label, low)):
        share = pairs.reshape(len(ordered), -1).mean(1)
        np.testing.assert_allclose(loss.numpy()[side], share[np.searchsorted(ordered, ratio[side])], rtol=1e-12)
        assert loss.numpy()[side].mean() == pytest.approx(pairs.mean(), rel=1e-12)


@pytest.mark.parametrize(("good", "bad"), [(4, 4), (3, 5)])
def test_gradient(good, bad):
    b = rated(good, bad)
    leaf = b.logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aot(replace(b, logps=x), beta=0.4)[0].mean(), leaf, atol=1e-8)
    (slope,) = torch.autograd.grad(aot(replace(b, logps=leaf), beta=0.4)[0].mean(), leaf)
    assert (slope[b.label] < 0).all()
    assert (slope[~b.label] > 0).all()


@pytest.mark.parametrize(("good", "bad"), [(4, 4), (3, 5)])
def test_order_and_ties(good, bad):
    b = rated(good, bad)
    order = torch.randperm(good + bad, generator=torch.Generator().manual_seed(1))
    moved = Rated(*(getattr(b, k)[order] for k in ("logps", "length", "label", "ref_logps")))
    torch.testing.assert_close(aot(b)[0][order], aot(moved)[0], rtol=1e-12, atol=0)
    start = replace(b, ref_logps=b.logps)  # all ratios tie
    np.testing.assert_allclose(aot(start)[0].numpy(), np.log(2), rtol=1e-12)


def test_distributional():
    """Which policy score belongs to which desirable answer is nothing; only the ratios' distributions count."""
    a = Rated(
        *(torch.tensor(v) for v in ([-1.0, -5.0, -3.0, -4.0], [2.0] * 4, [True, True, False, False], [-2.0, -2.0, -3.0, -6.0]))
    )
    b = replace(a, logps=a.logps[[1, 0, 3, 2]], ref_logps=a.ref_logps[[1, 0, 3, 2]])
    torch.testing.assert_close(aot(a)[0].sum(), aot(b)[0].sum())


def test_one_of_each_is_dpo():
    b = Rated(*(torch.tensor(v) for v in ([-3.0, -9.0], [2.0, 4.0], [True, False], [-4.0, -7.0])))
    np.testing.assert_allclose(aot(b, beta=0.5)[0].numpy(), np.log1p(np.exp(-1.5)), rtol=1e-6)


@pytest.mark.parametrize("label", [True, False])
def test_one_label_says_nothing(label):
    b = replace(rated(3, 3), label=torch.full((6,), label))
    leaf = b.logps.clone().requires_grad_()
    loss, metrics = aot(replace(b, logps=leaf))
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    assert not loss.any()
    assert not slope.any()
    assert metrics["one_sided"].item() == 1
    assert all(torch.isfinite(m).all() for m in metrics.values())


class Scores(torch.nn.Module):
    """Stands for a model: one recorded log-probability per row."""

    def __init__(self, values):
        super().__init__()
        self.values = values.unsqueeze(1)

    def forward(self, **_):
        nothing = self.values.detach() * 0
        return SimpleNamespace(log_probs=self.values, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def test_as_trl_computes_it():
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    b = rated(4, 4)
    b = replace(b, label=torch.tensor([True] * 4 + [False] * 4))
    own = b.logps.clone().requires_grad_()
    trainer = object.__new__(module.DPOTrainer)
    trainer.model = model = Scores(own)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=torch.as_tensor, gather=torch.as_tensor)
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.label_smoothing = ["aot_unpaired"], [1.0], 0.3, 0.0
    trainer.ld_alpha, trainer.f_divergence_type, trainer.use_weighting = None, "reverse_kl", False
    trainer.precompute_ref_logps, trainer.aux_loss_enabled = True, False
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    ids, mask = torch.ones(8, 2, dtype=torch.long), torch.tensor([[0, 1]] * 8)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": b.ref_logps[:4], "ref_rejected_logps": b.ref_logps[4:]}
    theirs = trainer._compute_loss(model, inputs, False)
    mine = b.logps.clone().requires_grad_()
    ours = aot(replace(b, logps=mine), beta=0.3)[0].mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v, x in ((ours, mine), (theirs, own))), rtol=1e-10, atol=0)
