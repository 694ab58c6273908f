"""LionA (Kosson, Messmer & Jaggi 2024): sign updates of the size that AdamW's have once it has settled."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, part


def kappa(beta: float) -> float:
    """Mean square of an average of white noise of unit variance, ``(1-β)/(1+β)``: 0.0526 for β = 0.9."""
    return (1 - beta) / (1 + beta)


def signs(grads: list[Tensor], momenta: list[Tensor], beta: float, nesterov: bool) -> list[Tensor]:
    """New tensors ``sign(c)``; the ``momenta`` are brought up to date in place.

    ``m ← β m + (1-β) g``, then ``c = β m + (1-β) g`` (``nesterov``) or ``c = m``.
    """
    torch._foreach_lerp_(momenta, grads, 1 - beta)
    mixed = torch._foreach_lerp(grads, momenta, beta) if nesterov else momenta
    return list(torch._foreach_sign(mixed))


@part(
    "optimizer/lion-a",
    paper="arXiv:2410.23922",
    rows=(5, 16),
    claim=Claim(
        text="at equal learning rate and weight decay LionA ends level with AdamW, whose steady update size it has from step 1",
        metric="eval_loss",
        against="optimizer/adamw",
        figure="GPT2-124M: a constant update size alone does not remove the need for warmup (losses not printed)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class LionA(Rule):
    """Sign momentum whose every update has root mean square √κ, κ = (1-β)/(1+β), from the first step on.

    ``m ← β m + (1-β) g``; ``c = β m + (1-β) g`` with ``nesterov``, else m; direction ``√κ · sign(c)`` (0 stays 0).
    AdamW's bias-corrected momentum of white noise has ``√(κ (1+βᵗ)/(1-βᵗ))``: 1 at the first step, √κ (0.229 for
    β = 0.9) in the long run, so its first step is 4.4 times the later ones. LionA takes AdamW's learning rate and
    weight decay as they are, and has no such first steps; it does not control angles (see ``optimizer/lion-ar``).

    ``inverse_bias_correction`` multiplies by ``1 - βᵗ``: steps grow while the momentum fills. For training without
    warmup the paper uses it with β = 0.98 and ``nesterov``, in lion-ar; with LionA alone warmup still helps.

    State: one tensor like the parameter, half of AdamW's. Cost: a few element-wise passes, as Lion. Clipping gradients
    changes almost nothing, since only signs count. The factor √κ belongs to AdamW's first beta: with β = 0.98 the same
    learning rate makes steps of 0.1 instead of 0.229.
    """

    elementwise = True
    default_lr = 3e-4

    beta: Beta = 0.9
    nesterov: bool = False
    inverse_bias_correction: bool = False

    def scale(self, t: int) -> float:
        """Size of every entry of the direction at step ``t``."""
        return math.sqrt(kappa(self.beta)) * (1 - self.beta**t if self.inverse_bias_correction else 1.0)

    def init(self, p: Tensor) -> State:
        """Momentum at zero."""
        return {"m": torch.zeros_like(p)}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above."""
        return signs([g], [state["m"]], self.beta, self.nesterov)[0].mul_(self.scale(step.t))

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """The whole list by torch's foreach kernels."""
        along = signs(grads, [s["m"] for s in states], self.beta, self.nesterov)
        if step.weight_decay:
            torch._foreach_mul_(params, 1 - step.lr * step.weight_decay)
        torch._foreach_add_(params, along, alpha=-step.lr * self.scale(step.t))
