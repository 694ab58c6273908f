"""Losses that are no sums over units (sorted pairs, batch statistics), exact however a step is split.

The scores of all micro-batches of all processes are computed without gradient and joined; the loss of the whole gives its
slope with respect to every score; a second pass over each micro-batch then carries these slopes into the weights. That is
the gradient of the whole loss by the chain rule, at the price of one more forward pass. A step that is one micro-batch on
one process needs none of this.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Batch, Lists, Pairs

POLICY = ("logps", "chosen_logps", "rejected_logps", "sampled_logps", "other_logps", "chosen", "rejected", "logits")
"""Fields that depend on the weights."""
Slopes = dict[str, Tensor]
Loss = Callable[[Batch], Any]
Gather = Callable[[list[Tensor]], list[list[Tensor]]]


@dataclass(frozen=True)
class Whole:
    """The loss of a whole step and where its slopes lead."""

    total: Tensor
    """Sum of the loss over all units of the step."""
    units: int
    metrics: dict[str, Tensor]
    """Sums over the units."""
    slopes: list[Slopes]
    """For each of this process's micro-batches: field -> gradient of ``total``."""


def whole(loss: Loss, parts: Sequence[Batch], gather: Gather, rank: int) -> Whole:
    """The loss of ``parts`` (this process's micro-batches) together with those of the other processes.

    ``gather`` collects a list of tensors from all processes, in order of rank, this one's included.
    """
    mine = join([_map(p, Tensor.detach) for p in parts])
    ranks = [_filled(mine, iter(found)) for found in gather(_tensors(mine))]
    joined = join(ranks)
    leaves = {name: value.requires_grad_() for name, value in policy(joined).items()}
    with torch.enable_grad():
        result = loss(_with(joined, leaves))
        values, metrics = result if isinstance(result, tuple) else (result, {})
        total = values.sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    slopes = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}
    return Whole(
        total.detach(), values.numel(), {k: _sum(v.detach(), values.numel()) for k, v in metrics.items()},
        _split(_split(slopes, ranks)[rank], parts),
    )  # fmt: skip


@torch.no_grad()
def whole_value(loss: Loss, parts: Sequence[Batch]) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Loss sum, units and metric sums of ``parts`` together, without the slopes: for evaluations."""
    result = loss(join(parts))
    values, metrics = result if isinstance(result, tuple) else (result, {})
    return values.sum(), values.numel(), {k: _sum(v, values.numel()) for k, v in metrics.items()}


def carried(batch: Batch, slopes: Slopes) -> Tensor:
    """A scalar whose gradient is that of the whole loss, as far as it flows through ``batch``."""
    terms = [(value * slopes[name].to(value.dtype)).sum() for name, value in policy(batch).items()]
    return torch.stack(terms).sum()


def nothing(batch: Batch) -> Slopes:
    """Slopes of rows that add nothing to the step."""
    return {name: torch.zeros_like(value) for name, value in policy(batch).items()}


def empty(batch: Batch) -> Batch:
    """A batch like this one with no rows."""
    return _map(batch, lambda t: t[:0])


def join(parts: Sequence[Batch]) -> Batch:
    """Batches of one type, one after the other; answers of their tokens are numbered on, shorter lists are padded."""
    parts = [_widened(p, parts) for p in parts]
    first: Any = parts[0]
    counts = [2 * len(p.chosen_logps) if isinstance(p, Pairs) else p.present.numel() for p in parts if hasattr(p, "tokens")]
    found: dict[str, Any] = {}
    for f in fields(first):
        values = [getattr(p, f.name) for p in parts]
        if any(v is None for v in values):  # margins, which only some data have
            found[f.name] = None
        elif f.name == "tokens":
            found[f.name] = join([replace(t, sequence=t.sequence + n) for t, n in zip(values, _before(counts), strict=True)])
        else:
            found[f.name] = torch.cat(values)
    return type(first)(**found)


def _before(counts: Sequence[int]) -> list[int]:
    """How many come before each."""
    return [sum(counts[:i]) for i in range(len(counts))]


def policy(batch: Any, prefix: str = "") -> dict[str, Tensor]:
    """The scores of a batch that depend on the weights, by (dotted) field name."""
    found: dict[str, Tensor] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if is_dataclass(value):
            found |= policy(value, f"{prefix}{f.name}.")
        elif f.name in POLICY and value is not None:
            found[prefix + f.name] = value
    return found


def _with(batch: Any, values: dict[str, Tensor]) -> Any:
    own = {n: v for n, v in values.items() if "." not in n}
    inner = {n.partition(".")[0] for n in values if "." in n}
    for name in inner:
        below = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{name}.")}
        own[name] = _with(getattr(batch, name), below)
    return replace(batch, **own)


def _map(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """``f`` of every tensor."""
    changed = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if value is not None:
            changed[field.name] = _map(value, f) if is_dataclass(value) else f(value)
    return replace(batch, **changed)


def _tensors(batch: Any) -> list[Tensor]:
    """Every tensor, in the order of the fields."""
    found: list[Tensor] = []
    _map(batch, lambda t: found.append(t) or t)
    return found


def _filled(batch: Any, tensors: Iterator[Tensor]) -> Any:
    """A batch like this one with other tensors."""
    return _map(batch, lambda _: next(tensors))


def _widened(part: Any, parts: Sequence[Any]) -> Any:
    if not isinstance(part, Lists):
        return part
    own, width = part.present.shape[1], max(p.present.shape[1] for p in parts)
    wide = _map(replace(part, tokens=None), lambda t: F.pad(t, (0, width - t.shape[1])))
    if part.tokens is None:
        return wide
    place = part.tokens.sequence
    return replace(wide, tokens=replace(part.tokens, sequence=place // own * width + place % own))


def _split(slopes: Slopes, parts: Sequence[Any]) -> list[Slopes]:
    out: list[Slopes] = []
    at = dict.fromkeys(slopes, 0)
    for part in parts:
        mine: Slopes = {}
        for name, value in policy(part).items():
            piece = slopes[name][at[name] : at[name] + len(value)]
            at[name] += len(value)
            mine[name] = piece[:, : value.shape[1]] if value.ndim == 2 else piece
        out.append(mine)
    return out


def _sum(values: Tensor, units: int) -> Tensor:
    return values.float().mean() * units
