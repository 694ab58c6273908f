"""Tensors that are split over processes (``DTensor``), and rounding: how optimizer state is opened and
written back.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, without importing ``torch.distributed``."""
    return hasattr(tensor, "device_mesh")


def opened(tensor: Any, *, whole: bool) -> Tensor:
    """A plain tensor: ``tensor`` itself, this process's piece (sharing memory), or with ``whole`` the
    gathered copy.

    Gathering is collective: every process of the mesh must take part.
    """
    if not is_sharded(tensor):
        return tensor
    return tensor.full_tensor() if whole else tensor.to_local()


def split_like(p: Any, value: Tensor) -> Tensor:
    """``value`` (whole, the same on every process) split over the processes as ``p`` is; no communication."""
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def pieces_like(p: Any, value: Tensor) -> Tensor:
    """The ``DTensor`` whose pieces are each process's ``value``, laid out as ``p``."""
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def gradient_like(p: Any, grad: Any) -> Tensor:
    """``grad`` with the placements of ``p``: backward may leave it reduced or split in another way."""
    if is_sharded(p) and is_sharded(grad) and tuple(grad.placements) != tuple(p.placements):
        return grad.redistribute(placements=p.placements)
    return grad


def agreed(good: bool, tensors: Iterable[Any]) -> bool:
    """Whether ``good`` on every process that holds a piece of ``tensors``; just ``good`` when none is sharded."""
    mesh = next((t.device_mesh for t in tensors if is_sharded(t)), None)
    if mesh is None:
        return good
    flag = torch.tensor(float(good), device=mesh.device_type)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def write(target: Any, value: Tensor, *, whole: bool, noise: torch.Generator | None = None) -> None:
    """Store ``value`` in ``target`` (converting the dtype); with ``whole`` a sharded target keeps only its
    piece.

    With ``noise``, a value stored as bfloat16 is rounded up or down at random so that its mean is preserved:
    an average with beta = 0.999 changes by less than half a unit in the last place and would never move if
    rounded to nearest.
    """
    if is_sharded(target):
        value = split_like(target, value).to_local() if whole else value  # type: ignore[attr-defined]
        target = target.to_local()
    if noise is not None and target.dtype == torch.bfloat16 and value.dtype != torch.bfloat16:
        value = stochastic_bf16(value, noise)
    target.copy_(value)


def stochastic_bf16(value: Tensor, noise: torch.Generator) -> Tensor:
    """``value`` as bfloat16, rounded to one of its two neighbours with a mean equal to ``value``."""
    bits = value.float().contiguous().view(torch.int32)
    dither = torch.randint(0, 1 << 16, bits.shape, generator=noise, device=bits.device, dtype=torch.int32)
    rounded = ((bits + dither) & -65536).view(torch.float32)
    # Adding to the bits of inf gives nan; non-finite values keep their meaning.
    return torch.where(torch.isfinite(value), rounded, value).to(torch.bfloat16)


def local_bytes(tensor: Any) -> int:
    """Bytes that this process holds of ``tensor``."""
    piece = opened(tensor, whole=False)
    return piece.numel() * piece.element_size()
