"""SGD with momentum, in the form of an average (the non-adaptive arm of Zhao et al. 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, part


@part("optimizer/sgd-momentum", paper="arXiv:2407.07972", rows=(1,))
@dataclass(frozen=True, kw_only=True)
class SGDMomentum(Rule):
    """Stochastic gradient descent along an exponential average of the gradients.

    ``m ← β m + (1-β) g``, direction ``m`` (``nesterov``: ``β m + (1-β) g``). torch's SGD accumulates instead
    of averaging: its learning rate is ours times (1-β). State: one tensor like the parameter.
    """

    elementwise = True
    default_lr = 0.1

    beta: Beta = 0.9
    nesterov: bool = False

    def init(self, p: Tensor) -> State:
        """The average at zero."""
        return {"m": torch.zeros_like(p)}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above."""
        m = state["m"].lerp_(g, 1 - self.beta)
        return g.lerp(m, self.beta) if self.nesterov else m
