"""Adafactor (Shazeer & Stern 2018, algorithms 4 and 5), with the switches that Zhao et al. 2024 turn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, NonNegative, Positive, part


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@part(
    "optimizer/adafactor",
    paper="arXiv:1804.04235",
    rows=(1,),
    claim=Claim(
        text="Adafactor, with a second moment of rows and columns only, ends clearly below SGD with momentum",
        metric="eval_loss",
        against="optimizer/sgd-momentum",
        minimum_effect=0.1,
        figure="150M to 1.2B on C4: all but SGD agree in loss and stability (exact gaps not printed)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
    """Adam's second moment kept as the means of its rows and columns, with update clipping.

    For two and more dimensions, over the last two, with ``S = g² + eps1``: ``r ← β₂ r + (1-β₂) rowmean(S)``,
    ``c ← β₂ c + (1-β₂) colmean(S)``, ``V = r cᵀ / mean(r)``; vectors keep the whole V. Then ``u = g / √V``,
    divided by ``max(1, RMS(u) / clip)``. ``β₂ = 1 - t^-decay`` unless ``beta2`` is given. ``beta1 > 0``
    averages u (one tensor like the parameter). ``scale_parameter`` multiplies by ``max(eps2, RMS(p))``,
    ``relative_step`` by ``min(0.01, 1/√t)`` (use it with lr 1). ``clip: null`` turns clipping off. Sharded
    tensors are gathered.
    """

    default_lr = 3e-4

    beta1: Beta = 0.9
    beta2: Beta | None = None
    decay: Positive = 0.8
    clip: Positive | None = 1.0
    eps1: NonNegative = 1e-30
    eps2: NonNegative = 1e-3
    scale_parameter: bool = False
    relative_step: bool = False

    def init(self, p: Tensor) -> State:
        """``row`` [..., m] and ``col`` [..., n] of a tensor [..., m, n], or ``v``; ``m`` when ``beta1`` is
        not 0.
        """
        state = {"m": torch.zeros_like(p)} if self.beta1 else {}
        if p.ndim < 2:
            return {**state, "v": torch.zeros_like(p)}
        return {**state, "row": p.new_zeros(p.shape[:-1]), "col": p.new_zeros(p.shape[:-2] + p.shape[-1:])}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above."""
        keep = 1 - step.t**-self.decay if self.beta2 is None else self.beta2
        u = g * self._inverse_root(g.square() + self.eps1, state, 1 - keep)
        if self.clip is not None:
            u /= (_rms(u) / self.clip).clamp(min=1.0)
        if self.scale_parameter:
            u *= _rms(p).clamp(min=self.eps2)
        if self.relative_step:
            u *= min(1e-2, step.t**-0.5)
        return state["m"].lerp_(u, 1 - self.beta1) if self.beta1 else u

    def _inverse_root(self, square: Tensor, state: State, weight: float) -> Tensor:
        """``1/√V``, from the two factors without forming V: the product of two roots cannot underflow as V
        can.
        """
        if "v" in state:
            return state["v"].lerp_(square, weight).rsqrt()
        row = state["row"].lerp_(square.mean(dim=-1), weight)
        col = state["col"].lerp_(square.mean(dim=-2), weight)
        return (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
