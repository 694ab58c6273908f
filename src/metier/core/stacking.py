"""Equal-shaped tensors processed as one stack, and lists of tensors in portions of bounded size."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

PORTION = 2**26
"""Elements worked on at once: bounds the transient memory of copies (256 MiB in float32)."""
T = TypeVar("T")


def buckets(items: Iterable[T], key: Callable[[T], Hashable], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of items with equal keys, each of at most :data:`PORTION` elements (or one item), in order of
    appearance.
    """
    sorted_by_key: dict[Hashable, list[T]] = {}
    for item in items:
        sorted_by_key.setdefault(key(item), []).append(item)
    for same in sorted_by_key.values():
        portion: list[T] = []
        total = 0
        for item in same:
            if portion and total + size(item) > PORTION:
                yield portion
                portion, total = [], 0
            portion.append(item)
            total += size(item)
        yield portion


def stack(tensors: list[Tensor]) -> Tensor:
    """``[k, …]``; a single tensor gives a view, so that nothing is copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def unstack(stacked: Tensor, targets: list[Tensor]) -> None:
    """Write ``[k, …]`` back into its k tensors."""
    if len(targets) == 1 and stacked.data_ptr() == targets[0].data_ptr():
        return
    torch._foreach_copy_(targets, list(stacked.unbind(0)))
