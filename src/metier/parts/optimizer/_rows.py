"""Rows (output neurons) of stacks of weights ``[k, m, …]``, or whole tensors: lengths, centring."""

import torch
from torch import Tensor

from metier.core.errors import UsageError
from metier.core.optim import Step


def axes(stacked: Tensor, per_row: bool) -> tuple[int, ...]:
    """The dimensions within a row, or within a tensor."""
    return tuple(range(2 if per_row else 1, stacked.ndim))


def length(stacked: Tensor, per_row: bool) -> Tensor:
    """2-norms, ``[k, m, 1, …]`` or ``[k, 1, …]``."""
    return torch.linalg.vector_norm(stacked, dim=axes(stacked, per_row), keepdim=True)


def centred(stacked: Tensor, rho: Tensor, per_row: bool) -> Tensor:
    """Without the mean, stretched to length ``rho``; what is constant stays."""
    shifted = stacked - stacked.mean(axes(stacked, per_row), keepdim=True)
    size = length(shifted, per_row)
    return torch.where(size > 1e-6 * rho, shifted * (rho / size), stacked)


def refuse_zeros(rho: Tensor, step: Step) -> None:
    """Raise ``UsageError`` that names the first tensor whose lengths are all 0: it has no direction to turn."""
    for i, some in enumerate(rho.flatten(1).any(1).tolist()):
        if not some:
            raise UsageError(
                f"{step.names[i] if step.names else 'a parameter'} is all zeros: a rotation would leave it so",
                hint="Give it weight decay 0 in the optimizer's groups: it is then moved by lion-a.",
            )
