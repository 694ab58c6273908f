"""Bottleneck adapters after both sub-layers of every block (arXiv:1902.00751, section 2.1 and figure 2)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metier.core.adapt import BlockAdapter
from metier.core.part import Count, NonNegative, part

NONLINEARITIES = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
NORMS = ("*norm*.weight", "*norm*.bias", "*Norm*.weight", "*Norm*.bias", "*.ln_*.weight", "*.ln_*.bias")


@part("adapter/houlsby", paper="arXiv:1902.00751", rows=(145,))
class Houlsby(BlockAdapter):
    """``h <- h + U f(D h + d) + u`` on the output ``h`` of attention and feed-forward, before the residual
    sum.

    ``D [m, width]`` and ``U [width, m]`` start normal with deviation ``std``, truncated at two deviations,
    biases at zero: near the identity. ``std=0`` starts ``D`` at the size of LoRA's ``A`` and ``U`` at zero,
    exactly the identity. ``layer_norms`` trains the model's layer norms too, as the paper does.
    """

    def __init__(
        self,
        base: nn.Module,
        width: int,
        *,
        bottleneck: Count = 64,
        nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = "gelu",
        std: NonNegative = 0.01,
        layer_norms: bool = True,
    ) -> None:
        super().__init__(base, width)
        self.nonlinearity = NONLINEARITIES[nonlinearity]
        self.also_trains = NORMS if layer_norms else ()
        self.down = self.trainable(_start(bottleneck, width, std or None))
        self.up = self.trainable(_start(width, bottleneck, std) if std else torch.zeros(width, bottleneck))
        self.down_bias = self.trainable(torch.zeros(bottleneck))
        self.up_bias = self.trainable(torch.zeros(width))

    def adapt(self, h: Tensor) -> Tensor:
        """``h [..., width]`` with the bottleneck's output added."""
        inside = self.nonlinearity(F.linear(self.cast(h), self.down, self.down_bias))
        return h + F.linear(inside, self.up, self.up_bias).to(h.dtype)


def _start(rows: int, columns: int, std: float | None) -> Tensor:
    if std is None:
        return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=5**0.5)
    return nn.init.trunc_normal_(torch.empty(rows, columns), std=std, a=-2 * std, b=2 * std)
