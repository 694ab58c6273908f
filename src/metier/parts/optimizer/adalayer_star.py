"""Adalayer* (Zhao et al. 2024): Adalayer with one second moment per logit in the output layer."""

from dataclasses import dataclass, replace

from metier.core.part import Claim, part
from metier.parts.optimizer.adalayer import Adalayer


@part(
    "optimizer/adalayer-star",
    paper="arXiv:2407.07972",
    rows=(1,),
    claim=Claim(
        text="one adaptive scale per layer, and per logit in the output layer, ends clearly below SGD with momentum",
        metric="eval_loss",
        against="optimizer/sgd-momentum",
        minimum_effect=0.1,
        figure="C4: closes most of Adalayer's distance to Adam (gaps not printed)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class AdalayerStar(Adalayer):
    """Adalayer whose output layer is split into one layer per vocabulary row.

    As ``optimizer/adalayer``: ``m ← β₁ m + (1-β₁) g``, ``v ← β₂ v + (1-β₂) mean(g²)``, direction
    ``(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)``, with one v per tensor, and in the output layer ``[vocabulary, n]`` one per
    row: gradients of frequent and rare tokens differ by orders of magnitude. State: one tensor like the parameter, one
    number per tensor and one per vocabulary row. Cost: Adalayer's.

    ``tied``: the output layer is tied to the embedding table, which then counts as the output layer. Without it a tied
    table counts as embeddings, hence as one layer, and nothing differs from Adalayer. Outside of metier's loop the output
    layer is a parameter group with ``role="head"``. ``per_row`` splits every other tensor too.
    """

    tied: bool = False

    def for_role(self, role: str) -> Adalayer:
        """The same rule, ``per_row`` for the output layer."""
        return replace(self, per_row=True) if role == "head" or (self.tied and role == "embeddings") else self
