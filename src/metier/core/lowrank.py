"""``y = x Wᵀ + b + s (x Aᵀ) Bᵀ`` with ``W`` frozen, in as few passes over memory as there are matrix products.

On a CPU a pass over the output of a layer costs a tenth of the layer's product; written with separate operations a low-rank
update makes one more forward and one more backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _LowRankLinear(torch.autograd.Function):
    """With incoming ``g``: ``dx = g W + s (g B) A``, ``dA = s (g B)ᵀ x``, ``dB = gᵀ (s x Aᵀ)``; ``W`` and ``b`` get none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        inside = (x @ down.T).mul_(scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, down, up, inside)
        return F.linear(x, weight, bias).addmm_(inside, up.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (g,) = grads
        x, weight, down, up, inside = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates twice: plain operations, which autograd knows
            back = ctx.scale * (g @ up)
            return g @ weight + back @ down, None, None, back.T @ x, g.T @ (ctx.scale * (x @ down.T)), None
        back = (g @ up).mul_(ctx.scale)
        dx = (g @ weight).addmm_(back, down) if ctx.needs_input_grad[0] else None
        return dx, None, None, back.T @ x, g.T @ inside, None


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``[..., in] -> [..., out]``: ``weight [out, in]`` and ``bias`` frozen, ``down [r, in]``, ``up [out, r]``, one type."""
    y = _LowRankLinear.apply(x.flatten(0, -2), weight, bias, down, up, scale)
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[union-attr]
