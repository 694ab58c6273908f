"""Eigenbases of running second moments, followed from step to step, for stacks of matrices ``[k, d, d]``.

Second moments are symmetric, so only the blocks on and above the diagonal are kept up to date; the rest of the storage is
stale until :func:`mirrored_`.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

RIDGE = 1e-30
PANEL = 128
"""Rows of a second moment computed by one product: small enough to skip nearly half of the work, large enough for BLAS."""


def unfolded(x: Tensor, axis: int) -> Tensor:
    """``[k, d, rest]`` from ``x`` ``[k, …, d, …]`` with d at ``axis`` (not counting the stack)."""
    return x.movedim(axis + 1, 1).flatten(2) if x.ndim > 2 else x.unsqueeze(-1)


def add_moment_(total: Tensor, x: Tensor, weight: float) -> None:
    """``total ← (1 - weight) total + weight x xᵀ`` for ``total`` ``[k, d, d]`` and ``x`` ``[k, d, n]``, in place, on and above
    the diagonal."""
    for i in range(0, total.shape[-1], PANEL):
        total[:, i : i + PANEL, i:].baddbmm_(x[:, i : i + PANEL], x[:, i:].mT, beta=1 - weight, alpha=weight)


def mirrored_(total: Tensor) -> Tensor:
    """``total`` with what is below the diagonal brought up to date, in place."""
    for i in range(PANEL, total.shape[-1], PANEL):
        total[:, i:, i - PANEL : i] = total[:, i - PANEL : i, i:].mT
    return total


def eigenbasis(moment: Tensor, x: Tensor) -> Tensor:
    """Orthonormal eigenvectors, largest eigenvalue first, of a ``moment`` ``[k, d, d]`` that is a multiple of ``x xᵀ``.

    Where ``x`` ``[k, d, n]`` has fewer columns than rows they come from its singular value decomposition: the basis of the
    null space then depends continuously on ``x``; that of an eigendecomposition would be rounding noise.
    """
    if x.shape[-1] < x.shape[-2]:
        return _safely(lambda y: torch.linalg.svd(y, full_matrices=True)[0], x)
    ridge = RIDGE * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return _safely(lambda a: torch.linalg.eigh(a)[1].flip(-1), mirrored_(moment) + ridge)


def power_iteration(a: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration towards the eigenbasis of ``a`` ``[k, d, d]``.

    The columns of ``basis`` are put in the order of their Rayleigh quotients, largest first, multiplied by ``a`` and made
    orthonormal again by QR. Returns the new basis and that order ``[k, d]``.
    """
    product = a @ basis
    order = (basis * product).sum(-2).argsort(dim=-1, descending=True, stable=True)
    return torch.linalg.qr(permuted(product, order, 1))[0], order


def rotate(x: Tensor, basis: Tensor, axis: int, *, back: bool = False) -> Tensor:
    """``x`` ``[k, …, d, …]`` in the coordinates of ``basis`` ``[k, d, d]`` along ``axis``, or back from them."""
    k, d, shape = x.shape[0], x.shape[axis + 1], x.shape
    if axis == x.ndim - 2:
        return (x.reshape(k, -1, d) @ (basis.mT if back else basis)).view(shape)
    blocks = x.reshape(k, shape[1 : axis + 1].numel(), d, -1)
    return ((basis if back else basis.mT).unsqueeze(1) @ blocks).view(shape)


def permuted(x: Tensor, order: Tensor, axis: int) -> Tensor:
    """``x`` ``[k, …, d, …]`` with the entries along ``axis`` of every member of the stack in its ``order`` ``[k, d]``."""
    return torch.stack([one.index_select(axis, o) for one, o in zip(x.unbind(0), order.unbind(0), strict=True)])


def renew_(
    moment: Tensor, basis: Tensor, axis: int, rows: Sequence[int], turned: Tensor, placed: Sequence[tuple[Tensor, int]]
) -> None:
    """:func:`power_iteration` for the members ``rows`` of a stack, in place.

    ``turned`` is held in the basis along ``axis`` and brought into the new one; of ``placed`` the entries along the given
    axes are only put in the new order.
    """
    chosen: Sequence[int] | slice = slice(None) if len(rows) == len(basis) else rows
    old = basis[chosen]
    new, order = power_iteration(mirrored_(moment[chosen]), old)
    turned[chosen] = rotate(rotate(turned[chosen], old, axis, back=True), new, axis)
    basis[chosen] = new
    for x, along in placed:
        x[chosen] = permuted(x[chosen], order, along)


def _safely(decompose: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """``decompose(a)``, in float64 when it does not converge in the dtype of ``a``."""
    try:
        return decompose(a)
    except torch.linalg.LinAlgError:
        return decompose(a.double()).to(a.dtype)


def due(names: Sequence[str], axis: int, s: int, every: int, spread: bool) -> list[int]:
    """Which of the tensors have the basis of ``axis`` renewed at step ``s``: each every ``every`` steps, all at multiples of it
    or, ``spread``, each at its own :func:`phase`."""
    return [i for i, name in enumerate(names) if s % every == (phase(name, axis, every) if spread else 0)]


@cache
def phase(name: str, axis: int, every: int) -> int:
    """On which of ``every`` steps the basis of an axis is renewed: a function of the tensor's name alone, so that neither
    neighbours nor resuming change it. Numbers in the name are added: equal weights of consecutive layers come one by one.
    """
    kind = re.sub(r"\d+", "", name)
    return (crc32(f"{kind}/{axis}".encode()) + sum(map(int, re.findall(r"\d+", name)))) % every


def fused(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """``shape`` with neighbouring axes made one, from the left, while their product is at most ``limit``."""
    out = [1]
    for d in shape:
        if out[-1] == 1 or out[-1] * d <= limit:
            out[-1] *= d
        else:
            out.append(d)
    return tuple(out)
