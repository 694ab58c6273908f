"""AdamW (Loshchilov & Hutter, algorithm 2), by torch's fused or foreach kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, NonNegative, part


@part("optimizer/adamw", paper="arXiv:1711.05101")
@dataclass(frozen=True, kw_only=True)
class AdamW(Rule):
    """Adam with decoupled weight decay: first moment over the root of the second, both bias-corrected.

    ``m ← β₁ m + (1-β₁) g``, ``v ← β₂ v + (1-β₂) g²``, direction ``(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)``.
    State: two tensors like the parameter.
    """

    elementwise = True
    default_lr = 3e-4

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-8

    def init(self, p: Tensor) -> State:
        """Both moments at zero."""
        return {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above, with ε outside the root."""
        m, v = (
            state["m"].lerp_(g, 1 - self.beta1),
            state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2),
        )
        root = v.div(1 - self.beta2**step.t).sqrt_().add_(self.eps)
        return m.div(1 - self.beta1**step.t).div_(root)

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """The whole list by one kernel of torch."""
        from torch.optim.adamw import adamw

        # The fused kernels walk through memory: silently wrong when a gradient is laid out differently.
        alike = all(
            p.stride() == g.stride() == s["m"].stride() == s["v"].stride() for p, g, s in zip(params, grads, states, strict=True)
        )
        fused = alike and params[0].device.type in ("cpu", "cuda", "xpu", "mps")
        # torch counts the step itself; the counters live where its kernels want them.
        where = params[0].device if fused else torch.device("cpu")
        adamw(
            params, grads, [s["m"] for s in states], [s["v"] for s in states], [],
            [torch.tensor(float(step.t - 1), device=where) for _ in params],
            fused=fused, foreach=not fused, amsgrad=False, beta1=self.beta1, beta2=self.beta2,
            lr=step.lr, weight_decay=step.weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip
