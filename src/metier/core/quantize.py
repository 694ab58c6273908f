"""Simulated 4-bit floating point (E2M1): rounding, scales, outliers, and gradients through the rounding.

Everything computes in the tensor's own type, float32 at least, and answers in its own type. ``dim`` is the dimension that
one scale or one pair of thresholds covers, ``None`` for the whole tensor. Values that are not finite make their whole group
NaN, so that guards see them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What E2M1 (two bits of exponent, one of mantissa, no NaN) can say, and their negatives."""
LARGEST = 6.0


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest level for each element, ties up (towards plus infinity); beyond 6 it saturates."""
    x = x.clamp(-LARGEST, LARGEST)
    per_level = _levels_per_unit(x.abs())
    x = x * per_level
    y = x.round()  # half to even; the difference below is exact, so exactly the ties that went down are found
    return (y + (x - y == 0.5)) / per_level


def _levels_per_unit(size: Tensor) -> Tensor:
    """Inverse distance of the levels around ``size`` >= 0: 2 below 2, 1 below 4, then 0.5."""
    return 2.0 - (size >= 2).to(size.dtype) - 0.5 * (size >= 4).to(size.dtype)


def absmax_scale(x: Tensor, dim: int | None, power_of_two: bool = False) -> Tensor:
    """``s = 6 / max |x|`` over ``dim`` (kept), 1 for a group of zeros; rounded down to a power of two if asked for."""
    x = wide(x)
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    s = LARGEST / largest
    if power_of_two:
        s = s / (2 * torch.frexp(s).mantissa)  # exact, which a logarithm is not
    # Also groups so small that their scale would overflow: they round to zero.
    return torch.where(largest <= LARGEST / torch.finfo(x.dtype).max, 1.0, s)


def quantize(x: Tensor, dim: int | None, power_of_two: bool = False) -> Tensor:
    """``q(x) = round_e2m1(s x) / s`` with ``s`` of :func:`absmax_scale`; shape and type of ``x``."""
    if x.numel() == 0:
        return x.clone()
    s = absmax_scale(x, dim, power_of_two)
    return (round_e2m1(wide(x) * s) / s).to(x.dtype)


def clamp_outliers(x: Tensor, alpha: float, dim: int | None) -> Tensor:
    """``x`` with the ``round((1 - alpha) n)`` smallest and as many largest of every ``n`` elements over ``dim`` moved to
    the next one that stays: thresholds are the quantiles ``1 - alpha`` and ``alpha``. ``alpha = 1`` changes nothing."""
    n = x.numel() if dim is None else x.shape[dim]
    beyond = min(round((1 - alpha) * n), (n - 1) // 2)
    if beyond < 1 or x.numel() == 0:
        return x
    flat, axis = (x.flatten(), 0) if dim is None else (x, dim)
    low = flat.topk(beyond + 1, axis, largest=False, sorted=False).values.amax(axis, keepdim=True)
    high = flat.topk(beyond + 1, axis, sorted=False).values.amin(axis, keepdim=True)
    return x.clamp(low, high)


def quantize_clamped(
    x: Tensor, dim: int | None, *, alpha: float, alpha_dim: int | None, compensate: bool, power_of_two: bool = False
) -> Tensor:
    """``q(c)``, or ``q(c) + (x - c)`` to ``compensate``, where ``c`` is ``x`` with its outliers clamped over ``alpha_dim``.

    A product with ``q(c) + (x - c)`` is that of ``q(c)`` plus that of the sparse rest, which is what is simulated.
    """
    y = wide(x)
    c = clamp_outliers(y, alpha, alpha_dim)
    q = quantize(c, dim, power_of_two)
    return (q + (y - c) if compensate else q).to(x.dtype)


def staircase_slope(x: Tensor, k: float, cap: float) -> Tensor:
    """Slope ``(1/k) |2z/d - 1|^(1/k - 1)``, at most ``cap``, of a smooth staircase through the levels; ``x`` is scaled.

    ``d`` is the length of the interval between levels that ``x`` lies in, ``z`` the place within it. It is ``1/k`` at the
    levels and infinite, without the cap, halfway between them; ``k = 1`` is the identity, with slope 1.
    """
    size = x.abs().clamp(max=LARGEST)
    place = size * _levels_per_unit(size)  # every level is a multiple of the distance of the levels around it
    return ((2 * (place - place.floor()) - 1).abs().pow(1 / k - 1) / k).clamp(max=cap)


def pass_through(x: Tensor, value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """``value(x)`` forward; backward the gradient passes unchanged, or times ``slope(x)``, which counts as constant.

    Keeps ``x`` for the backward pass only with a slope, and nothing else.
    """
    return _PassThrough.apply(x, value, slope)


class _PassThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor] | None) -> Tensor:
        return value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.slope = inputs[2]
        if ctx.slope is not None:
            ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.slope is None:
            return grad, None, None
        (x,) = ctx.saved_tensors
        return (grad * ctx.slope(x.detach())).to(grad.dtype), None, None


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
