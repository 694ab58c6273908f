"""Signal-to-noise ratio of a step's gradient, from averages that a momentum method can keep (arXiv:2410.23922).

With batch gradients ``g = s + noise``, the bias-corrected momentum keeps the signal and the fraction
``k = κ (1+βᵗ)/(1-βᵗ)`` of the noise's square: averages N_g of |g|², N_m of its square and K of k give
``noise = (N_g - N_m)/(1 - K)``. The published form uses the bare k instead of K, which is biased while the averages fill.
"""

import torch
from torch import Tensor

from metier.parts.optimizer.lion_a import kappa

BLIND = 1e-4
"""Least 1 - K that is divided by: at the first step momentum and gradient are equal, up to rounding."""


def averages(kept: list[Tensor], grads: list[Tensor], momenta: list[Tensor], beta: float, decay: float, t: int) -> Tensor:
    """Bring ``kept`` (``[3]`` per tensor: N_g, N_m, K, from 0) up to step ``t``; debiased ``[k, 3]``."""
    left = beta**t
    whole, averaged = (torch.stack(torch._foreach_norm(x)).square() for x in (grads, momenta))
    k = torch.full_like(whole, kappa(beta) * (1 + left) / (1 - left))
    stats = torch.stack(kept).lerp(torch.stack([whole, averaged / (1 - left) ** 2, k], -1), 1 - decay)
    torch._foreach_copy_(kept, list(stats.unbind(0)))
    return stats / (1 - decay**t)


def split(stats: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms ``[k]`` of signal and noise in the batch gradient; all signal while blind."""
    whole, averaged, k = stats.unbind(-1)
    noise = ((whole - averaged) / (1 - k).clamp(min=BLIND)).clamp(min=0).minimum(whole)
    return whole - noise, noise


def multiplier(stats: Tensor, batch: int) -> Tensor:
    """``√((1 + s/B) / (1 + s))`` ``[k]`` with s = signal/noise; 1 where there is no gradient.

    A normalised update of a batch of B then changes representations as much as it would in pure noise.
    """
    signal, noise = split(stats)
    tiny = torch.finfo(stats.dtype).tiny
    return torch.where(signal + noise > 0, ((noise + signal / batch) / (signal + noise).clamp(min=tiny)).sqrt(), 1.0)
