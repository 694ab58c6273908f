"""Adalayer (Zhao et al. 2024): Adam with one second moment for a whole tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, NonNegative, part


@part(
    "optimizer/adalayer",
    paper="arXiv:2407.07972",
    rows=(1,),
    claim=Claim(
        text="one adaptive scale per layer already ends clearly below SGD with momentum",
        metric="eval_loss",
        against="optimizer/sgd-momentum",
        minimum_effect=0.1,
        figure="C4: recovers much of Adam's gain over SGD; most of the rest with one scale per logit (gaps not printed)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Adalayer(Rule):
    """Averaged gradients divided by one running root mean square per tensor: momentum SGD whose scale adapts.

    ``m ← β₁ m + (1-β₁) g``, ``v ← β₂ v + (1-β₂) mean(g²)`` over the tensor, direction
    ``(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)``: Adam when all entries of every gradient are equally large.

    ``per_row``: one v per index of the first dimension (an output of a linear layer, an entry of a vector) instead;
    ``optimizer/adalayer-star`` does so in the output layer only. State: one tensor like the parameter and one number (or
    one per row). Cost: about that of momentum SGD and one pass for the norm. Use it to save half of AdamW's state, or to
    see where adaptivity within a tensor matters. A fused projection, such as one matrix for queries, keys and values,
    counts as one layer. Clipping by the global norm changes it only through the balance of steps. Sharded tensors are
    gathered, so v is that of the whole.
    """

    default_lr = 3e-4

    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: NonNegative = 1e-8
    per_row: bool = False

    def init(self, p: Tensor) -> State:
        """``m`` like the parameter, ``v`` [] or [rows], at zero."""
        return {"m": torch.zeros_like(p), "v": p.new_zeros(self._layers(p))}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above."""
        m = state["m"].lerp_(g, 1 - self.beta1)
        layers = self._layers(g)
        entries = g.reshape([*layers, -1])
        square = torch.linalg.vector_norm(entries, dim=-1).square_() / entries.shape[-1]
        v = state["v"].lerp_(square, 1 - self.beta2)
        root = v.div(1 - self.beta2**step.t).sqrt_().add_(self.eps)
        return m / root.mul_(1 - self.beta1**step.t).reshape([*layers, *[1] * (g.ndim - len(layers))])

    def _layers(self, p: Tensor) -> torch.Size:
        """Shape of the second moment."""
        return p.shape[:1] if self.per_row else torch.Size()
