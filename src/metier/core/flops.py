"""Counting the FLOPs of matrix products and attention, with the operations that torch's own counter leaves out.

Left out by torch are products added in place and the attention kernel of the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def counter() -> FlopCounterMode:
    """A context whose ``get_total_flops()`` counts a multiplication and an addition as two."""
    known = {op: flops for name, flops in FORMULAS.items() if (op := getattr(torch.ops.aten, name, None)) is not None}
    return FlopCounterMode(display=False, custom_mapping=known)


def _product(total: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """``total + a b`` with ``a [m, k]``, ``b [k, n]``."""
    return 2 * a[0] * a[1] * b[1]


def _batched_product(total: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """The same for stacks ``a [s, m, k]``, ``b [s, k, n]``."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Scores and weighted values: ``q [B, H, S, D]``, ``k [B, H', T, D]``, ``v [B, H', T, E]``; masks save nothing."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Scores again, and the gradients of weights, values, queries and keys."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


FORMULAS: dict[str, Callable[..., int]] = {
    "addmm_": _product,
    "baddbmm_": _batched_product,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
