"""How well low-rank adapters are aligned with the loss's steepest directions (Xu et al., 2025, arXiv:2503.06982)."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from metier.core.adapt import LinearAdapter
from metier.core.basegrad import base_gradients, top_singular
from metier.core.part import part
from metier.core.probing import Probe

MEASURES = ("left", "left_chance", "left_top", "right", "right_chance", "right_top", "balance", "size", "descent")


@part("probe/lora-alignment", paper="arXiv:2503.06982", rows=(14,))
def lora_alignment(probe: Probe) -> dict[str, Any]:
    """Factors ``B [out, r]``, ``A [r, in]`` of every low-rank adapter against the gradient ``G`` of the mean loss at the
    weight under it, with all adapters switched off: ``-G = U Σ Vᵀ`` is what the first steps from the base run after.

    Per layer: ``left`` = ``|QᵀU_r|² / r``, the mean squared cosine of the principal angles between the columns of B (Q an
    orthonormal basis) and the top r left singular vectors, ``left_chance`` = r / out what a random B has; ``left_least``
    the smallest of these cosines; ``left_top`` = ``|⟨u₁, b₁⟩|`` with b₁ the top left singular vector of B, 1 less the
    paper's misalignment; ``right…`` the same of Aᵀ and V. ``balance`` = ``|BᵀB - A Aᵀ| / (|B|² + |A|²)``: gradient flow
    keeps the numerator constant, balanced starts have 0. ``size`` = ``(|B|² + |A|²)^½``. ``descent``: cosine between the
    change of the weight that the adapter makes and ``-G``; negative would mean uphill. None: no value (a factor is zero).
    The summary holds medians over the layers.

    Small starts first align and then grow: ``left_top`` near 1 while ``size`` is small is the theory's first phase. G is
    of the data probed: with ``--on eval`` it is another sample than the one trained on. A model without such adapters
    gives no layers. Memory: one float32 copy of the adapted weights; cost: a backward pass per layout and a singular
    value decomposition per layer.
    """
    found = {n: m for n, m in probe.model.named_modules() if isinstance(m, LinearAdapter) and m.pair() is not None}
    if not found:
        return {"adapters": 0, "layers": []}
    with _off(probe.model):
        gradients = base_gradients(probe.module, found, probe.layouts, probe.engine)
    rows = [{"layer": name, **_measured(adapter, gradients.pop(name))} for name, adapter in found.items()]
    return {"adapters": len(rows), **{f"median_{m}": _median(rows, m) for m in MEASURES}, "layers": rows}  # type: ignore[arg-type]


@contextlib.contextmanager
def _off(model: Any) -> Iterator[None]:
    """All adapters switched off."""
    on = [m for m in model.modules() if isinstance(m, LinearAdapter) and m.enabled]
    for m in on:
        m.enabled = False
    try:
        yield
    finally:
        for m in on:
            m.enabled = True


@torch.no_grad()
def _measured(adapter: LinearAdapter, gradient: Tensor) -> dict[str, float | None]:
    pair = adapter.pair()
    assert pair is not None
    down, up = (t.to(gradient.dtype) for t in pair)
    u, _, vt = top_singular(-gradient, len(down))
    norms = up.square().sum() + down.square().sum()
    gap = torch.linalg.matrix_norm(up.T @ up - down @ down.T)
    change = adapter.merged()[0].to(gradient.dtype) - adapter.base.weight.to(gradient.dtype)
    return {
        **_side("left", up, u), **_side("right", down.T, vt.T), "balance": _number(gap / norms),
        "size": _number(norms.sqrt()), "descent": _number(-(change * gradient).sum() / (change.norm() * gradient.norm())),
    }  # fmt: skip


def _side(name: str, factor: Tensor, wanted: Tensor) -> dict[str, float | None]:
    """Angles between the columns of ``factor [n, r]`` and of ``wanted [n, k]``, orthonormal; k = min(r, n, …)."""
    basis, sizes, _ = torch.linalg.svd(factor, full_matrices=False)
    tiny = sizes[0] * max(factor.shape) * torch.finfo(factor.dtype).eps
    basis = basis[:, sizes > tiny]
    if basis.shape[1] == 0:
        return {name: None, f"{name}_least": None, f"{name}_top": None, f"{name}_chance": None}
    cosines = torch.linalg.svdvals(basis.T @ wanted)
    return {
        name: _number(cosines.square().mean()), f"{name}_least": _number(cosines.min()),
        f"{name}_top": _number((basis[:, 0] @ wanted[:, 0]).abs()),
        f"{name}_chance": max(basis.shape[1], wanted.shape[1]) / len(factor),
    }  # fmt: skip


def _number(value: Tensor) -> float | None:
    x = float(value)
    return x if math.isfinite(x) else None


def _median(rows: list[Mapping[str, Any]], measure: str) -> float | None:
    values = [r[measure] for r in rows if r[measure] is not None]
    return median(values) if values else None
