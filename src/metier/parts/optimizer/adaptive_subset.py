"""Adaptive learning rates where they matter (Zhao et al. 2024): output layer and norms; SGD elsewhere."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from metier.core import part as parts
from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, Positive, part

SUBSETS = {"both": ("head", "rest"), "head": ("head",), "norms": ("rest",)}


@part(
    "optimizer/adaptive-subset",
    paper="arXiv:2407.07972",
    rows=(1,),
    claim=Claim(
        text="an adaptive rule in the output layer and the norms only ends clearly below momentum SGD everywhere",
        metric="eval_loss",
        against="optimizer/sgd-momentum",
        minimum_effect=0.1,
        figure="C4: keeps Adam's loss and most of its stability in the learning rate (gaps not printed)",
    ),
)
@dataclass(frozen=True, kw_only=True)
class AdaptiveSubset(Rule):
    """Momentum SGD for the trunk, an adaptive rule for the output layer, for norms, or for both.

    The trunk (hidden matrices, embeddings, tensors of more dimensions) moves by ``optimizer/sgd-momentum``:
    ``m ← β m + (1-β) g``, direction m. ``on`` says what ``adaptive`` moves: ``head`` the output layer, ``norms`` the gains
    (all parameters of fewer than two dimensions, hence also biases of linear layers where there are any), or ``both``.
    The paper's later version insists on both. ``beta2`` is the adaptive rule's; its other options are its defaults.

    The learning rate is the trunk's; the adaptive rule's is ``ratio`` times smaller. Without ``ratio`` it is that of the
    two rules' defaults (about 300); the paper's lies between 100 and 10 000, and it must be tuned: SGD's best learning rate
    follows the scale of the gradients, the adaptive one does not. ``groups: {head: {lr: …}}`` sets one apart.

    ``tied``: the output layer is tied to the embedding table, which then counts as the output layer; without it a tied
    table is trunk, and ``on: head`` finds nothing to move. State: one tensor like the parameter, and for the subset what
    the adaptive rule keeps. Cost: momentum SGD's. Use it to study where adaptivity matters, or to save AdamW's second
    state in the trunk.
    """

    adaptive: Literal["adamw", "adafactor", "adalayer-star"] = "adamw"
    on: Literal["both", "head", "norms"] = "both"
    beta: Beta = 0.9
    beta2: Beta = 0.95
    ratio: Positive | None = None
    tied: bool = False

    @property
    def default_lr(self) -> float:  # type: ignore[override]
        """The trunk's: that of momentum SGD, or ``ratio`` times the adaptive rule's."""
        return self._trunk.default_lr if self.ratio is None else self.ratio * self._chosen.default_lr

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """As the trunk's rule."""
        return self._trunk.elementwise

    def for_role(self, role: str) -> Rule:
        """The adaptive rule for the roles that ``on`` names, this rule for the others."""
        if self.tied and role == "embeddings":
            role = "head"
        return self._chosen.for_role(role) if role in SUBSETS[self.on] else self

    def init(self, p: Tensor) -> State:
        """The trunk's."""
        return self._trunk.init(p)

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor | None:
        """The trunk's."""
        return self._trunk.update(g, p, state, step)

    @cached_property
    def _trunk(self) -> Rule:
        return parts.build("optimizer", {"sgd-momentum": {"beta": self.beta}}).obj

    @cached_property
    def _chosen(self) -> Rule:
        return parts.build("optimizer", {self.adaptive: {"beta2": self.beta2}}).obj
