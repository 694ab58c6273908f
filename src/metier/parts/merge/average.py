"""Average of the weights of several models (model soups, arXiv:2203.05482; checkpoint averaging, SWA)."""

import torch
from torch import Tensor

from metier.core.errors import UsageError
from metier.core.part import NonNegative, part


@part("merge/average", paper="arXiv:2203.05482", rows=(156,))
def average(tensors: list[Tensor], base: Tensor | None, *, weights: list[NonNegative] | None = None) -> Tensor:
    """``Σ wᵢ Wᵢ / Σ wᵢ``, computed in float32 or wider; equal weights unless given, one per model in order.

    ``base`` is not used. Raises ``UsageError`` when there are not as many weights as models or all are zero.
    """
    w = [1.0] * len(tensors) if weights is None else weights
    if len(w) != len(tensors):
        raise UsageError(f"{len(w)} weights for {len(tensors)} models", where="merge/average.weights")
    if not sum(w) > 0:
        raise UsageError("all weights are zero", where="merge/average.weights")
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=wide)
    for weight, tensor in zip(w, tensors, strict=True):
        total.add_(tensor.to(wide), alpha=weight)
    return (total / sum(w)).to(tensors[0].dtype)
