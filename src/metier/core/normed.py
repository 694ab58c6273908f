"""Norms behind linear layers: one mean over a head or over the whole output."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.core.errors import UsageError
from metier.core.sublayers import FUSED, Place, Wrapper, attentions, head_size, projections, width, with_values

Over = Literal["head", "projection"]
Gains = Literal["shared", "each", "none"]


class Norm(nn.Module):
    """Normalises the last dimension in groups of ``size``; computed in float32 at least.

    ``centre`` subtracts the mean first. ``gains``: one vector ``[size]`` for all groups (``shared``), one for each
    (``each``, ``[groups, size]``), or ``none``; with ``bias`` a vector of the same shape is added, 0 at the start.
    """

    def __init__(self, size: int, groups: int, centre: bool, gains: str, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.size, self.centre, self.eps = size, centre, eps
        shape = {"shared": (size,), "each": (groups, size)}.get(gains)
        self.weight = None if shape is None else nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape or (size,))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[…, groups * size]`` -> the same shape and type."""
        y = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, self.size))
        y = (
            F.layer_norm(y, (self.size,), eps=self.eps)
            if self.centre
            else y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        )
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return y.flatten(-2).to(x.dtype)


class Normed(Wrapper):
    """A projection followed by norms: of its whole output, or of its thirds (queries, keys, values) in order when
    there are several; thirds beyond the norms stay as they are."""

    def __init__(self, name: str, linear: nn.Module, norms: list[Norm]) -> None:
        super().__init__(name, linear)
        self.norm = norms[0]
        if len(norms) > 1:
            self.key_norm = norms[1]
        if len(norms) > 2:
            self.value_norm = norms[2]

    def forward(self, x: Tensor) -> Tensor:
        """Projection of ``[…, D]``, normalised."""
        out = self.layer(x)
        if not hasattr(self, "key_norm"):
            return self.norm(out)
        q, k, v = out.chunk(3, dim=-1)
        v = self.value_norm(v) if hasattr(self, "value_norm") else v
        return torch.cat([self.norm(q), self.key_norm(k), v], dim=-1)


def normalise_projections(
    model: Any, where: str, *, values: bool = False, over: Over = "head", centre: bool, gains: Gains, bias: bool, eps: float
) -> None:
    """Put a norm behind the projections to queries and keys (and values), after their bias and before rotary positions.

    Raises ``UsageError`` for attention that is not known, or that has such norms already.
    """
    found = attentions(model, where)
    for attention in found:
        if any(isinstance(getattr(attention, n), Normed) for n in projections(attention)) or hasattr(attention, "q_norm"):
            raise UsageError(f"{type(model).__name__} already normalises its queries and keys", where=where)
    for attention in found:
        names = projections(attention)
        thirds = 2 + values if names == (FUSED,) else 1
        for name in with_values(names) if values else names:
            layer = getattr(attention, name)
            size = head_size(attention)
            whole = width(layer) // (3 if name == FUSED else 1)
            size = size if over == "head" else whole
            norms = [Norm(size, whole // size, centre, gains, eps, bias) for _ in range(thirds)]
            Place(attention, name).put(Normed(name, layer, [n.to(_weight(layer)) for n in norms]))


def normalise_output(place: Place, *, eps: float) -> None:
    """Put a layer norm with gain and bias over the whole output behind the linear layer at ``place``."""
    layer = place.module
    norm = Norm(width(layer), 1, True, "shared", eps, bias=True)
    place.put(Normed(place.name, layer, [norm.to(_weight(layer))]))


def _weight(layer: Any) -> Tensor:
    """The tensor whose device and type new parameters take."""
    return next(p for p in layer.parameters() if p.is_floating_point())
