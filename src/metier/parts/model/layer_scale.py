"""LayerScale: a small learnable gain per channel on every residual branch (arXiv:2103.17239, section 2; as a guard in
arXiv:2410.16682)."""

from typing import Any

import torch
from torch import Tensor, nn

from metier.core import models
from metier.core.part import NonNegative, part
from metier.core.sublayers import Wrapper, layers, refuse_output_norms, width


@part("model/layer-scale", paper="arXiv:2410.16682", rows=(9,))
def layer_scale(model: Any, *, init: NonNegative = 0.1) -> Any:
    """``x + diag(l) f(x)`` for both branches of a block, ``l`` learnable ``[D]``, ``init`` in every entry at the start.

    The vector sits behind the last linear layer of the branch (and its bias, before dropout, which commutes). ``init`` of
    the stability paper is not known; the first paper uses 0.1 up to 18 blocks, 1e-5 for 24 and 1e-6 beyond. With
    ``l = 0`` a pre-norm block is the identity. No weight decay on ``l``.

    Cost: one multiplication for each branch (1 % of forward and backward), ``2 D`` parameters a block. After training
    ``l`` can be multiplied into the rows of the layer before it. When to use: deep networks, or a higher learning
    rate at no loss of fused attention. Changes ``model`` in place and returns it. Raises ``UsageError`` for models
    with a norm behind their branches (it would undo the scale), for a mixture of experts, and for blocks it does
    not know.
    """
    where = "model/layer-scale"
    refuse_output_norms(model, where)
    for block in models.blocks(model):
        found = layers(block, where)
        for place in (*found["proj"], *found["fc2"]):
            place.put(Scaled(place.name, place.module, init))
    return model


class Scaled(Wrapper):
    """A layer whose outputs are multiplied by a learnable vector."""

    def __init__(self, name: str, layer: nn.Module, init: float) -> None:
        super().__init__(name, layer)
        like = next(p for p in layer.parameters() if p.is_floating_point())
        self.scale = nn.Parameter(torch.full((width(layer),), init, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """``[…, D]`` -> ``[…, D]``."""
        return self.layer(x) * self.scale
