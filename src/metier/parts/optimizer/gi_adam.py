"""GI-Adam (Kalra & Barkeshli 2024): Adam whose second moment starts at the first gradient's square."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.optim import State, Step
from metier.core.part import Claim, part
from metier.parts.optimizer.adamw import AdamW


@part(
    "optimizer/gi-adam",
    paper="arXiv:2406.09405",
    rows=(5, 16),
    claim=Claim(
        text="initialising the second moment with the first gradient lowers the loss reached without warmup",
        metric="eval_loss",
        against="optimizer/adamw",
        figure="vision models: fewer early instabilities and a wider range of learning rates (companion of rows 5 and 16)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class GIAdam(AdamW):
    """AdamW with ``v₀ = g₁²`` instead of 0, and the usual bias corrections: an automatic warmup.

    ``m ← β₁ m + (1-β₁) g``, ``v ← β₂ v + (1-β₂) g²``, direction ``(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)``. Since v is
    not small at first, dividing it by ``1-β₂ᵗ`` overstates it: while gradients are stationary the step is Adam's times
    ``√(1-β₂ᵗ)``, 0.032 at the first step and 0.8 after 1000 for β₂ = 0.999. This stretch depends on β₂ alone, not on the
    length of the run, so β₂ = 0.95 gives a warmup of about 30 steps only.

    The gradient at initialization is that of the first batch, seen once (``v₁ = g₁²``); nothing is evaluated twice. An
    entry whose first gradient is 0 starts as in Adam. Options, state (two tensors like the parameter), weight decay and
    speed are ``optimizer/adamw``'s.
    """

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above."""
        self._start([g], [state], step)
        return super().update(g, p, state, step)

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """The whole list by one kernel of torch."""
        self._start(grads, states, step)
        super().apply(params, grads, states, step)

    @staticmethod
    def _start(grads: list[Tensor], states: list[State], step: Step) -> None:
        if step.t == 1:
            torch._foreach_copy_([s["v"] for s in states], torch._foreach_mul(grads, grads))
