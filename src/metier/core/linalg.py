"""Linear algebra that several rules share, for stacks of matrices ``[…, m, n]``."""

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""The steepest slope at 0 for which singular values still end near 1 (between about 0.7 and 1.2)."""
EPS = 1e-7


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices to ``x`` ``[k, m, n]``, by Newton-Schulz.

    ``X ← aX + (bA + cA²)X`` with ``A = XXᵀ``, from ``x`` divided by its Frobenius norm; the coefficients are
    :data:`QUINTIC`.
    """
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# --- inverse square roots -----------------------------------------------------------------------------------

ROOTS = ("eigh", "newton-schulz", "newton", "polar")
POLAR = (
    (8.287212018145630, -23.59588651909883, 17.30038731253092),
    (4.107059111542198, -2.947849916737908, 0.5448431082926598),
    (3.948690853482296, -2.908902115962949, 0.5518191394370133),
    (3.318419657370597, -2.488488024314872, 0.5100489401237197),
    (2.300652019954820, -1.668903984574753, 0.4188073119525679),
    (1.891301407787399, -1.267995827194589, 0.3768040894852496),
    (1.875001480809715, -1.250001645312492, 0.3750001645037008),
    (1.875, -1.25, 0.375),
)  # fmt: skip
"""Odd quintics ``(a, b, c)`` that one after the other map [0.001, 1] closest to 1: each has the smallest largest error
on the interval to which those before it map, whose lower end is not taken below 0.02407 of the upper one, and is
rescaled so that both ends are equally far from 1 (Amsel et al., arXiv:2505.16932).
"""
MARGIN = 1.01
"""By how much rounding may exceed the interval of :data:`POLAR`."""
CUBIC = (2.0, -1.5, 0.5)
"""Convergent odd quintic with slope 2 at 0."""


def inverse_root(v: Tensor, *, method: str = "eigh", eps: float = 1e-10) -> Tensor:
    """``V^(-1/2)`` of symmetric positive semi-definite ``v`` ``[…, s, s]``.

    ``eps`` is relative to ``‖V‖_F``, so that ``V → c V`` only scales the result. ``eigh`` clamps eigenvalues at it (and at
    the dtype's precision, below which they are noise); the iterations add it to the diagonal. Iterations return large
    but finite values where ``V`` is nearly singular. A matrix that is zero, overflows or fails gives the identity.

    ``newton-schulz``: 30 coupled steps with slope 2; ``polar``: 10 coupled steps with :data:`POLAR`; ``newton``: coupled
    inverse Newton to a relative residual of 1e-6. All agree with ``eigh`` to 1e-3 for condition numbers up to 1e4.
    """
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    largest = v.abs().amax((-2, -1), keepdim=True)
    size = largest * torch.linalg.matrix_norm(v / largest, keepdim=True)
    good = torch.isfinite(size) & (size > 0)
    unit = torch.where(good, v / size, eye / v.shape[-1] ** 0.5)
    root = {"eigh": _root_eigh, "newton": _root_newton, "newton-schulz": _root_schulz, "polar": _root_polar}[method](unit, eps)
    good = good & torch.isfinite(root).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(good, root / size.sqrt(), eye)


def _root_eigh(unit: Tensor, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(unit)
    floor = max(eps, torch.finfo(unit.dtype).eps)
    return (vectors * values.clamp(min=floor).rsqrt().unsqueeze(-2)) @ vectors.mT


def _root_schulz(unit: Tensor, eps: float) -> Tensor:
    return _coupled(unit, eps, (CUBIC,) * 30)


def _root_polar(unit: Tensor, eps: float) -> Tensor:
    safe = [(a / MARGIN, b / MARGIN**3, c / MARGIN**5) for a, b, c in POLAR[:-1]]
    return _coupled(unit / MARGIN, eps, (*safe, *POLAR[-1:] * 3)) / MARGIN**0.5


def _coupled(unit: Tensor, eps: float, stages: Sequence[tuple[float, float, float]]) -> Tensor:
    """Z of ``Y, Z ← Y p(ZY), p(ZY) Z`` with ``p(x) = a + bx + cx²``: Y tends to the root, Z to its inverse."""
    z = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device).expand_as(unit)
    y = unit + eps * z
    for a, b, c in stages:
        zy = z @ y
        p = torch.matmul(zy, zy).mul_(c).add_(zy, alpha=b)
        y, z = torch.matmul(y, p).add_(y, alpha=a), torch.matmul(p, z).add_(z, alpha=a)
    return z


def _root_newton(unit: Tensor, eps: float, tolerance: float = 1e-6, most: int = 100) -> Tensor:
    """``X ← X T, M ← T² M`` with ``T = (3I - M)/2``; each matrix stops by itself, also when rounding keeps it from improving."""
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    m, x = 1.5 * (unit + eps * eye), math.sqrt(1.5) * eye.expand_as(unit)
    error = torch.full_like(unit[..., :1, :1], torch.inf)
    for _ in range(most):
        now = torch.linalg.matrix_norm(m - eye, keepdim=True) / torch.linalg.matrix_norm(m, keepdim=True)
        going = (now > tolerance) & ((now < error) | (now > 0.1))
        if not going.any():
            break
        t = 1.5 * eye - 0.5 * m
        x, m, error = torch.where(going, x @ t, x), torch.where(going, t @ t @ m, m), torch.where(going, now, 0.0)
    return x


# --- orthonormal columns ------------------------------------------------------------------------------------

OVERSAMPLE = 1.25
"""Rows of a random sketch, as a multiple of the columns (then up to a multiple of 128)."""


def orthonormal(x: Tensor, method: str = "householder") -> Tensor:
    """Orthonormal columns spanning those of ``x`` ``[k, m, r]``, m >= r, such that ``QᵀX`` is upper triangular.

    ``householder``: LAPACK's QR. ``cholesky``: two passes of ``X C⁻¹`` with ``CᵀC = XᵀX`` on columns of unit length.
    ``randomized``: C first from the QR of a random sketch of X (the same at every call for one shape), then one such
    pass; Householder when the sketch would not be smaller than X. Both fall back to Householder for each matrix where
    the result is not orthonormal, which costs a synchronisation on a GPU.
    """
    rows = -(-math.ceil(OVERSAMPLE * x.shape[-1]) // 128) * 128
    if method == "householder" or (method == "randomized" and rows >= x.shape[-2]):
        return _householder(x)
    if method == "cholesky":
        scaled = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True)
        first = _cholesky_pass(scaled, scaled.mT @ scaled)
    else:
        c = torch.linalg.qr(gaussian((rows, x.shape[-2]), like=x) @ x, mode="r").R
        first = torch.linalg.solve_triangular(c, x, upper=True, left=False)
    gram = first.mT @ first
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Closer to I than 1/2, so that the last pass is accurate; false where the first has failed.
    good = torch.linalg.matrix_norm(gram - eye) < 0.5
    q = _cholesky_pass(first, gram)
    if not bool(good.all()):
        q[~good] = _householder(x[~good])
    return q


def _householder(x: Tensor) -> Tensor:
    """The first factor of the QR decomposition, without making the second."""
    return torch.linalg.householder_product(*torch.geqrf(x))


def _cholesky_pass(x: Tensor, gram: Tensor) -> Tensor:
    """``X C⁻¹``; anything, perhaps not finite, where ``gram`` is not positive definite."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L.mT, x, upper=True, left=False)


def gaussian(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal numbers that depend on the shape alone: the same on every process and device."""
    source = torch.Generator().manual_seed(zlib.crc32(repr(tuple(shape)).encode()))
    return torch.randn(shape, generator=source, dtype=torch.float64).to(like)


def power_factors(
    b: Tensor,
    q: Tensor,
    *,
    iterations: int = 1,
    qr: str = "auto",
    eps: float = 0.0,
    mean: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor, Tensor]:
    """P ``[…, m, r]`` with orthonormal columns, R ``[…, n, r]`` with ``P Rᵀ ≈ B``, and R with unit columns, from ``b``
    ``[…, m, n]``, m >= n, and ``q`` ``[…, n, r]``.

    ``P = orth(mean(B Q))``, ``R = mean(Bᵀ P)``, again from ``Q = R`` up to ``iterations`` times. ``mean`` averages over
    replicas that have a B each. Where B is zero, P and R are too, and R with unit columns is Q with unit columns. Columns of
    R that are within rounding (√m units of precision) of the longest are zero instead of unit: where B has a lower rank,
    they hold nothing else.
    """
    method = qr if qr != "auto" else "householder" if b.device.type == "cpu" else "cholesky"
    r = q
    for _ in range(iterations):
        p = orthonormal(mean(r.mT @ b.mT).mT, method)
        r = mean(b.mT @ p)
    length = _lengths(r)
    empty = ~length.any(-1, keepdim=True)
    if bool(empty.any()):
        p, length = p.mul_(~empty), torch.where(empty, _lengths(q), length)
    noise = torch.finfo(b.dtype).eps * math.sqrt(b.shape[-2]) * length.amax(-1, keepdim=True)
    return p, r, torch.where(empty, q, r).mul_((length > noise) / (length + eps))


def _lengths(x: Tensor) -> Tensor:
    """Of the columns; on a CPU much faster than torch's norm."""
    return x.square().sum(-2, keepdim=True).sqrt_()
