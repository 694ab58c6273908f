"""One table over all losses with a reference on pairs: value and slopes at the start, and what holds for every one.

A loss is added by one line in ``FAMILY``. The values and signs are those of the card of the family, at policy equal to reference.
Bugs it is meant to catch: a sign, a constant, policy and reference exchanged, something read that is not declared.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from _referenced import at_init, build, pairs, random_pairs, single, slopes, value

from metier.core import part

LOG2 = float(np.log(2))
DOWN, FLAT, UP = -1, 0, 1


@dataclass(frozen=True)
class Start:
    """What a loss does at policy equal to reference."""

    name: str
    init: float
    chosen: int = DOWN
    """Sign of the gradient in the chosen log-probability; down raises it."""
    rejected: int = UP
    options: dict = field(default_factory=dict)
    slope: tuple[float, float] | None = None
    """Gradients in the two log-probabilities where the card gives them."""
    margin_only: bool = False
    """A function of ``h = Δ_w - Δ_l`` alone."""
    unbounded: bool = False

    @property
    def label(self):
        return self.name + "".join(f"-{k}={v}" for k, v in self.options.items())


FAMILY = [
    Start("dpo", LOG2, slope=(-0.05, 0.05), margin_only=True),
    Start("dpo", LOG2, options={"beta": 2.0}, slope=(-1.0, 1.0), margin_only=True),
    Start("cdpo", LOG2, options={"label_smoothing": 0.1}, slope=(-0.04, 0.04), margin_only=True),
    Start("robust-dpo", LOG2, options={"label_smoothing": 0.1}, slope=(-0.0625, 0.0625), margin_only=True, unbounded=True),
    Start("robust-dpo", LOG2, options={"label_smoothing": 0.0}, slope=(-0.05, 0.05), margin_only=True),
    Start("ipo", 25.0),
    Start("ipo", 1.0, options={"tau": 0.5, "average": False}, slope=(-2.0, 2.0), margin_only=True),
    Start("hinge", 1.0, slope=(-0.1, 0.1), margin_only=True),
    Start("exo", 2.7612, slope=(-0.1 / 4 * 6.906755, 0.1 / 4 * 6.906755), margin_only=True),
    Start("discopop", 0.84657, UP, DOWN, slope=(0.0784, -0.0784), margin_only=True),
    Start("f-dpo", LOG2, options={"divergence": "reverse-kl"}, slope=(-0.05, 0.05), margin_only=True),
    Start("f-dpo", LOG2, options={"divergence": "forward-kl"}, slope=(-0.05, 0.05)),
    Start("f-dpo", LOG2, options={"divergence": "js"}, slope=(-0.025, 0.025)),
    Start("f-dpo", LOG2, options={"divergence": "alpha", "alpha": 0.3}, slope=(-0.05, 0.05)),
    Start("ln-dpo", LOG2),
    Start("r-dpo", LOG2, options={"alpha": 0.0}, slope=(-0.05, 0.05), margin_only=True),
    Start("odpo", LOG2, options={"alpha": 0.0}, slope=(-0.05, 0.05), margin_only=True),
    Start("dpop", LOG2, options={"beta": 0.1}, slope=(-0.05, 0.05)),
    Start("rpo", LOG2, options={"alpha": 0.0}, slope=(-0.05, 0.05), margin_only=True),
    Start("cal-dpo", LOG2 + 25.0, slope=(-5.5, 5.5)),
    Start("sppo", 5e5, slope=(-1000.0, 1000.0)),
    Start("nca", 2 * LOG2, slope=(-0.01 / 4, 0.01 / 4)),
    Start("bco-pair", 2 * LOG2, slope=(-0.01 / 2, 0.01 / 2)),
    Start("apo-zero", 1.0, slope=(-0.1 / 4, 0.1 / 4)),
    Start("apo-down", 1.0, FLAT, UP, slope=(0.0, 0.1 / 4)),
    Start("label-smoothing", LOG2, options={"of": "dpo"}, slope=(-0.04, 0.04), margin_only=True),
    Start("length-normalized", LOG2, options={"of": "dpo"}),
    Start("combined", LOG2 + 1.0, options={"losses": ["dpo", "hinge"]}, slope=(-0.15, 0.15), margin_only=True),
]
every = pytest.mark.parametrize("row", FAMILY, ids=[row.label for row in FAMILY])
FREE = pytest.mark.parametrize("name", ["nll"])


@every
def test_value_and_slopes_at_the_start(row):
    b = at_init()
    np.testing.assert_allclose(value(row.name, b, **row.options), row.init, rtol=3e-5)
    found = slopes(row.name, b, **row.options)
    for side, sign in zip(found, (row.chosen, row.rejected), strict=True):
        assert (np.sign(np.where(np.abs(side) < 1e-15, 0, side)) == sign).all()
    if row.slope is not None:
        np.testing.assert_allclose(found[0], row.slope[0], rtol=1e-3, atol=1e-15)
        np.testing.assert_allclose(found[1], row.slope[1], rtol=1e-3, atol=1e-15)


@every
def test_gradients_are_those_of_the_loss(row):
    b = random_pairs(8, scale=1.5, seed=3)
    leaves = [v.clone().requires_grad_() for v in (b.chosen_logps, b.rejected_logps)]

    def loss(chosen, rejected):
        return value(row.name, replace(b, chosen_logps=chosen, rejected_logps=rejected), **row.options)

    torch.autograd.gradcheck(loss, leaves)


@every
def test_a_constant_per_answer_moves_policy_and_reference_alike(row):
    """Only log-ratios count; ``alpha`` of rpo is 0 here."""
    b = random_pairs()
    c = torch.arange(16.0, dtype=torch.float64)
    moved = replace(
        b, chosen_logps=b.chosen_logps - c, ref_chosen_logps=b.ref_chosen_logps - c,
        rejected_logps=b.rejected_logps - 2 * c, ref_rejected_logps=b.ref_rejected_logps - 2 * c,
    )  # fmt: skip
    np.testing.assert_allclose(value(row.name, moved, **row.options), value(row.name, b, **row.options), rtol=1e-9, atol=1e-12)


@every
def test_losses_of_the_margin_do_not_see_what_both_answers_share(row):
    b = random_pairs()
    both = replace(b, chosen_logps=b.chosen_logps - 1.5, rejected_logps=b.rejected_logps - 1.5)
    same = np.allclose(value(row.name, both, **row.options), value(row.name, b, **row.options), rtol=1e-9, atol=1e-12)
    assert same == row.margin_only


@pytest.mark.parametrize("row", [r for r in FAMILY if r.margin_only], ids=[r.label for r in FAMILY if r.margin_only])
def test_only_rdpo_is_unbounded_among_losses_of_the_margin(row):
    far = pairs([1e4], [0.0], [0.0], [0.0], margin=[1.0])
    scale = {} if "beta" not in part.options(part.load(row.name, "objective")) else {"beta": 1.0}
    assert (value(row.name, far, **{**row.options, **scale}).item() < -1e2) == row.unbounded


@every
def test_pairs_do_not_see_each_other(row):
    b = random_pairs(6)
    alone = [
        value(row.name, replace(b, **{k: v[i : i + 1] for k, v in vars(b).items() if v is not None}), **row.options)
        for i in range(6)
    ]
    np.testing.assert_allclose(torch.cat(alone), value(row.name, b, **row.options), rtol=1e-12)


@every
def test_extreme_scores_in_float32(row):
    for far in (-1e4, -1e-7):
        for chosen, rejected in ((far, -1e-7), (-1e-7, far)):
            b = single(pairs([chosen], [rejected], [-20.0], [-30.0], margin=[0.5]))
            assert torch.isfinite(value(row.name, b, **row.options)).all()
            assert all(np.isfinite(g).all() for g in slopes(row.name, b, **row.options))


@every
def test_the_metrics_order_the_answers(row):
    """Rewards of both, their margin and the accuracy; without gradient, and a tie counts one half."""
    prefix = "dpo/" if row.name == "combined" else ""
    for b, right in ((random_pairs(), None), (at_init(), 0.5)):
        metrics = build(row.name, **row.options)(b)[1]
        chosen, rejected, margin, accuracy = (
            metrics[prefix + k] for k in ("chosen_reward", "rejected_reward", "margin", "accuracy")
        )
        assert not any(v.requires_grad for v in (chosen, rejected, margin, accuracy))
        torch.testing.assert_close(margin, chosen - rejected)
        expected = (margin > 0).double() if right is None else torch.full_like(margin, right)
        torch.testing.assert_close(accuracy, expected)


@FREE
def test_losses_without_a_reference_do_not_read_one(name):
    b = random_pairs()
    noise = torch.randn(16, dtype=torch.float64)
    assert torch.equal(value(name, replace(b, ref_chosen_logps=noise, ref_rejected_logps=-noise)), value(name, b))
    assert "reference" not in part.load(name, "objective").__metier__.needs
