"""QK norm: normalise queries and keys, so that attention logits cannot grow without bound (arXiv:2302.05442,
section 2)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.core import models
from metier.core.errors import UsageError
from metier.core.part import Positive, part

SEPARATE = (("q_proj", "k_proj"), ("query", "key"))
"""Names of the two projections in transformers' attention modules."""
FUSED = "c_attn"
"""One projection whose output is queries, keys and values, a third each."""


@part("model/qk-norm", paper="arXiv:2302.05442", rows=(9,))
def qk_norm(
    model: Any,
    *,
    over: Literal["head", "projection"] = "head",
    norm: Literal["rms", "layer"] = "rms",
    gains: Literal["shared", "each", "none"] = "shared",
    eps: Positive = 1e-6,
) -> Any:
    """Queries and keys become ``g * x / rms(x)`` after their projection (and bias), before rotary positions.

    ``over`` is what one mean runs over: a head, or the whole projection. ``norm: layer`` subtracts the mean
    first. ``gains`` start at 1: one vector for all heads, one for each head, or none. Changes ``model`` in
    place and returns it; a projection ``…q_proj`` becomes ``…q_proj.q_proj`` beside ``…q_proj.norm``, so an
    adapter put on it later comes before the norm. Raises ``UsageError`` for attention it does not know, or
    that has such a norm already.
    """
    found = [m for block in models.blocks(model) for m in block.modules() if _projections(m)]
    if not found:
        raise UsageError(
            f"no attention with separate or c_attn projections in {type(model).__name__}",
            where="model/qk-norm",
        )
    for attention in found:
        if any(isinstance(getattr(attention, n), Normed) for n in _projections(attention)) or hasattr(attention, "q_norm"):
            raise UsageError(f"{type(model).__name__} already normalises its queries and keys", where="model/qk-norm")
        head: Any = getattr(attention, "head_dim", None) or attention.attention_head_size
        for name in _projections(attention):
            linear = getattr(attention, name)
            width = _outputs(linear) // (3 if name == FUSED else 1)
            size = head if over == "head" else width
            norms = [
                Norm(size, width // size, norm == "layer", gains, eps).to(linear.weight) for _ in range(2 if name == FUSED else 1)
            ]
            setattr(attention, name, Normed(name, linear, norms))
    return model


def _projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the projections of an attention module; empty for other modules."""
    if isinstance(module, Normed):
        return ()
    if hasattr(module, FUSED):
        return (FUSED,)
    return next((names for names in SEPARATE if all(hasattr(module, n) for n in names)), ())


def _outputs(linear: Any) -> int:
    return linear.out_features if hasattr(linear, "out_features") else linear.nf


class Norm(nn.Module):
    """Normalises the last dimension in groups of ``size``; computed in float32 at least."""

    def __init__(self, size: int, groups: int, centre: bool, gains: str, eps: float) -> None:
        super().__init__()
        self.size, self.centre, self.eps = size, centre, eps
        shape = {"shared": (size,), "each": (groups, size)}.get(gains)
        self.weight = None if shape is None else nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """``[…, groups * size]`` -> the same shape and type."""
        y = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, self.size))
        y = (
            F.layer_norm(y, (self.size,), eps=self.eps)
            if self.centre
            else y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        )
        y = y if self.weight is None else y * self.weight
        return y.flatten(-2).to(x.dtype)


class Normed(nn.Module):
    """A projection followed by norms: of its whole output, or of its first thirds (queries, keys) when there
    are two."""

    def __init__(self, name: str, linear: nn.Module, norms: list[Norm]) -> None:
        super().__init__()
        self.name = name
        # The inner layer keeps the projection's name: targets such as ``q_proj`` still find it.
        self.add_module(name, linear)
        self.norm = norms[0]
        if len(norms) == 2:
            self.key_norm = norms[1]

    def forward(self, x: Tensor) -> Tensor:
        """Projection of ``[…, D]``, normalised."""
        out = self.get_submodule(self.name)(x)
        if self.name != FUSED:
            return self.norm(out)
        q, k, v = out.chunk(3, dim=-1)
        return torch.cat([self.norm(q), self.key_norm(k), v], dim=-1)
