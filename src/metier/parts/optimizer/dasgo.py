"""DASGO (An et al. 2025): ASGO with a diagonal instead of a matrix, one number per column."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, Positive, part
from metier.parts.optimizer.adamw import AdamW
from metier.parts.optimizer.asgo import rescaled


@part(
    "optimizer/dasgo",
    paper="arXiv:2503.20762",
    rows=(13,),
    claim=Claim(
        text="DASGO, with one second moment per column, ends within 0.02 of AdamW or below",
        metric="eval_loss",
        against="optimizer/adamw",
        minimum_effect=0.0,
        figure="direction only, no loss values found",
    ),
)
@dataclass(frozen=True, kw_only=True)
class DASGO(Rule):
    """Momentum divided, column by column, by the root of an average of the columns' squared lengths.

    ``M ← β₁ M + (1-β₁) G``, ``v_j ← β₂ v_j + (1-β₂) Σᵢ G_ij²``, ``U_ij = M_ij / √(v_j + eps)``, direction
    ``0.2 √(mn) U / ‖U‖_F``, so that AdamW's learning rates carry over. Columns belong to the inputs of a ``torch.nn.Linear``.
    A matrix with orthogonal columns at every step is moved as by ``optimizer/asgo`` from the right. There is no bias
    correction; the rescaling makes it unnecessary. ``eps`` is absolute, as in the released code: only columns with
    squared length above it are scaled freely.

    State: ``mn + n``. Cost: that of a few passes over the matrix. Use it where Adam's second moment does not fit.
    Embeddings, head and all that is not 2-D go to AdamW (0.9, 0.95) with the same learning rate.
    """

    matrices = True
    default_lr = AdamW.default_lr

    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Positive = 1e-8

    def beside(self) -> Rule:
        """AdamW with the authors' betas."""
        return AdamW(beta2=0.95)

    def init(self, p: Tensor) -> State:
        """Momentum and the columns' second moments at zero."""
        return {"m": torch.zeros_like(p), "v": p.new_zeros(p.shape[1])}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above, for a stack ``[k, m, n]``."""
        v = state["v"].lerp_(g.square().sum(-2), 1 - self.beta2)
        m = state["m"].lerp_(g, 1 - self.beta1)
        return rescaled(m * (v + self.eps).rsqrt().unsqueeze(-2))
