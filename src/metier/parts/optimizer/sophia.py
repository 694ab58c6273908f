"""Sophia (Liu et al. 2023, algorithm 3 with the Gauss-Newton-Bartlett estimator): clipped diagonal preconditioning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, Count, Positive, part


@part(
    "optimizer/sophia",
    paper="arXiv:2305.14342",
    rows=(1,),
    claim=Claim(
        text="Sophia, like every adaptive method, ends clearly below SGD with momentum (and level with AdamW)",
        metric="eval_loss",
        against="optimizer/sgd-momentum",
        minimum_effect=0.1,
        figure="150M to 1.2B on C4: all but SGD agree (gaps not printed); its own paper: half of AdamW's steps",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Sophia(Rule):
    """Momentum over an estimate of the curvature, entry by entry, and never more than the learning rate.

    ``m ← β₁ m + (1-β₁) g``. Every ``every`` steps (1, 1 + k, 1 + 2k, …) labels are drawn from the model's own
    distribution; with g̃ the gradient of their mean loss and B their number, ``h ← β₂ h + (1-β₂) B g̃²``. Direction
    ``clip(m / max(γ h, ε), -1, 1)``. ``B g̃²`` estimates the diagonal of the Gauss-Newton matrix of the mean loss. No bias
    correction: h starts at 0, and where it stays there (a tensor that the sampled loss does not reach) the direction is
    the sign of m, as in Signum.

    Options: a larger ``gamma`` clips fewer entries; the authors advise a clipped share of 50 to 90 %. State: two tensors
    like the parameter. Cost: one more forward and backward pass every ``every`` steps, and about AdamW's arithmetic. The
    learning rate bounds every entry's move: somewhat below AdamW's, 3 to 5 times Lion's. Multiplying the loss by c keeps
    the sign of m but divides its unclipped entries by c: ``γ`` depends on the scale of the loss, unlike in Lion.

    The authors' release adds ε instead of taking the larger; keeps g̃² without B and multiplies by a B of its own in the
    step; clips g̃ by the norm meant for g, which understates the curvature wherever that clipping acts; and renews h after
    step k - 1 of each k, so that it starts with steps of sign momentum. The algorithm as printed is what is done here.
    """

    elementwise = True
    default_lr = 2e-4

    beta1: Beta = 0.965
    beta2: Beta = 0.99
    gamma: Positive = 0.05
    eps: Positive = 1e-12
    every: Count = 10

    @property
    def sample_every(self) -> int:  # type: ignore[override]
        """``every``: how many steps apart labels are drawn."""
        return self.every

    def init(self, p: Tensor) -> State:
        """Momentum and curvature at zero."""
        return {"m": torch.zeros_like(p), "h": torch.zeros_like(p)}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above."""
        m, h = state["m"].lerp_(g, 1 - self.beta1), state["h"]
        if step.sampled is not None and step.sampled[0] is not None:
            (slope,) = step.sampled
            h.mul_(self.beta2).addcmul_(slope, slope, value=(1 - self.beta2) * step.samples)  # type: ignore[arg-type]
        scale = h.mul(self.gamma).clamp_(min=self.eps)
        return torch.div(m, scale, out=scale).clamp_(-1, 1)

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """One by one on the CPU, where caches decide (3 times faster there); all at once elsewhere."""
        if params[0].device.type == "cpu":
            return self.plain(params, grads, states, step)
        return self.together(params, grads, states, step)

    def together(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """The whole list by torch's foreach kernels."""
        moments, curvatures = [s["m"] for s in states], [s["h"] for s in states]
        torch._foreach_lerp_(moments, grads, 1 - self.beta1)
        known = [(h, g) for h, g in zip(curvatures, step.sampled, strict=True) if g is not None] if step.sampled else []
        if known:
            renewed, slopes = [h for h, _ in known], [g for _, g in known]
            torch._foreach_mul_(renewed, self.beta2)
            torch._foreach_addcmul_(renewed, slopes, slopes, value=(1 - self.beta2) * step.samples)
        scales = torch._foreach_mul(curvatures, self.gamma)
        torch._foreach_clamp_min_(scales, self.eps)
        directions = torch._foreach_div(moments, scales)
        torch._foreach_clamp_min_(directions, -1.0)
        torch._foreach_clamp_max_(directions, 1.0)
        self.move(params, list(directions), step)
