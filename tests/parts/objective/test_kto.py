"""Oracle of objective/kto: the paper's value function in float64 numpy, and trl's own KTO loss on the same numbers.

Bugs it is meant to catch: the reference point per label or not clamped, gradient through it, weights inside the sigmoid,
lengths used, labels exchanged.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metier.core import part
from metier.core.batch import Rated
from metier.core.errors import UsageError
from metier.testing import check_part

RNG = np.random.default_rng(1)
LABEL = np.array([True, False, False, True, True, False, False])
NUMBERS = [-30 * RNG.random(7) for _ in range(4)]
"""Log-probabilities: policy, reference, policy and reference of the mismatched answers."""


def kto(batch, **options):
    return part.build("objective", {"kto": options}).obj(batch)


def rated(logps, ref, other, ref_other, label=LABEL):
    t = [torch.tensor(v, dtype=torch.float64) for v in (logps, ref, other, ref_other)]
    return Rated(t[0], torch.full_like(t[0], 5.0), torch.tensor(label), t[1], t[2], t[3])


def with_zero(zero):
    """The batch with mismatched answers whose mean log-ratio is ``zero``."""
    logps, ref, other, ref_other = NUMBERS
    return rated(logps, ref, other + zero - (other - ref_other).mean(), ref_other)


def expected(b, beta, good, bad):
    zero = max(0.0, float((b.other_logps - b.ref_other_logps).numpy().mean()))
    out = []
    for ratio, label in zip((b.logps - b.ref_logps).tolist(), b.label.tolist(), strict=True):
        value = 1 / (1 + np.exp(-beta * (ratio - zero))) if label else 1 / (1 + np.exp(-beta * (zero - ratio)))
        out.append((good if label else bad) * (1 - value))
    return np.array(out), zero


def test_contract():
    check_part("objective/kto")


@pytest.mark.parametrize("zero", [-4.0, 0.0, 2.5])
@pytest.mark.parametrize(("beta", "good", "bad"), [(0.1, 1.0, 1.0), (0.7, 1.3, 0.4)])
def test_value_function(zero, beta, good, bad):
    b = with_zero(zero)
    loss, metrics = kto(b, beta=beta, desirable_weight=good, undesirable_weight=bad)
    wanted, point = expected(b, beta, good, bad)
    np.testing.assert_allclose(loss.numpy(), wanted, rtol=1e-10)
    assert metrics["kl"].item() == pytest.approx(point, abs=1e-12)
    assert metrics["kl"].item() >= 0


def test_start_of_training():
    """Policy and reference equal: half the weight for every row, slope ``∓ λ β / 4``."""
    logps, _, other, _ = NUMBERS
    b = rated(logps, logps, other, other)
    leaf = b.logps.requires_grad_()
    loss, _ = kto(b, beta=0.3, desirable_weight=2.0, undesirable_weight=3.0)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), np.where(LABEL, 1.0, 1.5), rtol=1e-12)
    np.testing.assert_allclose(leaf.grad.numpy(), 0.3 / 4 * np.where(LABEL, -2.0, 3.0), rtol=1e-12)


@pytest.mark.parametrize("zero", [-4.0, 2.5])
def test_gradient(zero):
    """``∓ λ β s (1 - s)`` with ``s = σ(β(D - z₀))``, symmetric around the reference point; none through the reference point."""
    b = with_zero(zero)
    leaf, other = b.logps.requires_grad_(), b.other_logps.requires_grad_()
    loss, _ = kto(b, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5)
    slope, through = torch.autograd.grad(loss.sum(), [leaf, other], allow_unused=True)
    s = 1 / (1 + np.exp(-0.4 * (NUMBERS[0] - NUMBERS[1] - max(0.0, zero))))
    np.testing.assert_allclose(slope.numpy(), 0.4 * s * (1 - s) * np.where(LABEL, -1.5, 0.5), rtol=1e-9)
    assert through is None or through.abs().max() == 0


def test_no_gradient_through_the_reference_point_where_it_is_the_policy_too():
    """Mismatched scores computed from the same weights move the value but not the slope."""
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    b = with_zero(2.5)
    loss, _ = kto(replace(b, other_logps=b.other_logps + weight))
    assert not loss.requires_grad
    assert kto(replace(b, other_logps=b.other_logps + 1))[0].sum() != loss.sum()


def test_bell_shaped():
    """Far from the reference point on either side an answer moves nothing."""
    distances = torch.tensor([-12.0, -3.0, 3.0, 12.0], dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(4, dtype=torch.float64)
    b = Rated(distances, nothing + 5, torch.tensor([True] * 4), nothing, nothing, nothing)
    (slope,) = torch.autograd.grad(kto(b, beta=1.0)[0].sum(), distances)
    torch.testing.assert_close(slope, slope.flip(0), rtol=1e-9, atol=0)
    assert 0 < -slope[0] < 1e-4 < -slope[1]


def test_reference_point_of_zero_is_apo_zero_unpaired():
    apo = part.build("objective", {"apo_zero_unpaired": {"beta": 0.3, "undesirable_weight": 0.5}}).obj
    torch.testing.assert_close(
        kto(with_zero(-1.0), beta=0.3, undesirable_weight=0.5)[0], apo(with_zero(-1.0))[0], rtol=1e-12, atol=0
    )


def test_one_label_only():
    for label in (LABEL * 0 == 1, LABEL * 0 == 0):
        loss, metrics = kto(rated(*NUMBERS, label=label))
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(m).all() for m in metrics.values())


def test_metrics():
    _, m = kto(with_zero(2.5), beta=0.2)
    ratio = NUMBERS[0] - NUMBERS[1]
    np.testing.assert_allclose(m["reward"].numpy(), 0.2 * ratio, rtol=1e-10)
    np.testing.assert_allclose(m["accuracy"].numpy(), (ratio > 2.5) == LABEL)
    assert m["chosen_reward"].item() == pytest.approx(0.2 * ratio[LABEL].mean())
    assert m["rejected_reward"].item() == pytest.approx(0.2 * ratio[~LABEL].mean())


def test_defaults_and_ranges():
    torch.testing.assert_close(
        kto(with_zero(1.0))[0], kto(with_zero(1.0), beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)[0], rtol=0, atol=0
    )
    with pytest.raises(UsageError, match="beta"):
        kto(with_zero(1.0), beta=0.0)
    with pytest.raises(UsageError, match="desirable_weight"):
        kto(with_zero(1.0), desirable_weight=-1.0)


class Scores(torch.nn.Module):
    """Stands for a model: gives one recorded log-probability per row, those of mismatched answers for token 9."""

    def __init__(self, own, other):
        super().__init__()
        self.own, self.other = own, other

    def forward(self, input_ids, **_):
        values = (self.other if input_ids[0, 0] == 9 else self.own).unsqueeze(1)
        return SimpleNamespace(log_probs=values, entropy=values * 0, mean_logits=values * 0)


@pytest.mark.parametrize("zero", [-4.0, 2.5])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_as_trl_computes_it(name, zero):
    module = pytest.importorskip("trl.trainer.kto_trainer")
    b = with_zero(zero)
    own = b.logps.clone().requires_grad_()
    trainer = object.__new__(module.KTOTrainer)
    trainer.model = model = Scores(own, b.other_logps)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=torch.as_tensor)
    trainer.calculate_KL, trainer.loss_type = name == "kto", name
    trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = 0.3, 1.2, 0.7
    trainer.precompute_ref_logps, trainer.aux_loss_enabled = True, False
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    ids, mask = torch.ones(7, 2, dtype=torch.long), torch.tensor([[0, 1]] * 7)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask, "label": b.label}
    inputs |= {"KL_input_ids": ids * 9, "KL_attention_mask": ids, "KL_completion_mask": mask}
    theirs = trainer._compute_loss(model, {**inputs, "ref_logps": b.ref_logps, "ref_KL_logps": b.ref_other_logps}, False)
    mine = b.logps.clone().requires_grad_()
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    ours = part.build("objective", {name: options}).obj(replace(b, logps=mine))[0].mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v, x in ((ours, mine), (theirs, own))), rtol=1e-10, atol=0)
