"""A look at gradients before an optimizer changes anything."""

from collections.abc import Iterable

import torch
from torch import Tensor

from metier.core import shards, stacking
from metier.core.errors import MetierError


def called(name: str) -> str:
    """A parameter's name for messages; parameters without one are named by their place."""
    return f"parameter {name}" if name.isdigit() else name


def refuse_nonfinite(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ``MetierError`` that names the first gradient with a value that is not finite.

    On every process when gradients are sharded, so that none goes on alone.
    """
    given = [(n, p) for n, p in named if p.grad is not None]
    local = [shards.opened(p.grad, whole=False) for _, p in given]
    dense = [g for g in local if g.layout == torch.strided and g.numel()]
    clean = True
    for same in stacking.buckets(dense, lambda g: (g.device, g.dtype), lambda g: g.numel()):
        clean = clean and bool(torch.isfinite(torch.stack(torch._foreach_norm(same, float("inf"))).sum()))
    if shards.agreed(clean, (p for _, p in given)):
        return
    bad = next(
        (n for (n, _), g in zip(given, local, strict=True) if g.layout == torch.strided and not torch.isfinite(g).all()), None
    )
    what = "a gradient on another process" if bad is None else f"the gradient of {called(bad)}"
    raise MetierError(f"{what} is not finite; nothing has been changed")
