"""Critical batch size predicted from the noise of gradients (arXiv:1812.06162), in the definition of Zhang et al. (2024)."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metier.core import groups
from metier.core.errors import UsageError
from metier.core.part import NonNegative, Positive, part
from metier.core.probing import Probe


@part("probe/critical-batch-size", paper="arXiv:2410.21676", rows=(6,))
def critical_batch_size(probe: Probe, *, reference: NonNegative = 0.0, overhead: Positive = 0.2) -> dict[str, Any]:
    """``B* = o B_noise + (1 + o) B_ref`` with the noise scale ``B_noise = tr(S) / |G|²``: as a whole, by role and by tensor.

    With noise scale B_noise, steps to a goal are as ``1 + B_noise / B`` (``law/critical-batch-size`` with b/a = B_noise), so B*
    takes ``1 + o`` times the steps of linear scaling from B_ref (``reference``; 0: from very small batches). In examples.

    With k layouts of b examples, gradients g_i, mean ḡ and s the mean of ``|g_i|²``: ``|G|² = (k |ḡ|² - s) / (k - 1)`` and
    ``tr(S) = b k (s - |ḡ|²) / (k - 1)``, both unbiased. ``low`` and ``high`` are two standard errors of ``1 / B_noise`` by the
    jackknife over layouts; ``high`` (or a noise scale) is None where a gradient cannot be told from noise. Intervals need three
    layouts, and many to be narrow. Layouts with fewer examples than most are left out. Cost: two gradients a layout.

    **What it is not.** A prediction at one set of weights, without dropout, for plain gradient descent in a quadratic whose
    curvature is the same everywhere. Adam rescales the gradient; the measured critical batch differs from this by factors, while
    growth during training and differences of roles are more telling. The measurement itself is a set of runs to a goal:
    ``law/critical-batch-size`` says how.
    """
    layouts = _equal(probe)
    k, size = len(layouts), len(layouts[0].ids)
    mean, squares = _mean(probe, layouts)
    dots = [_products(probe.gradient(x), mean) for x in layouts] if k > 2 else []
    role_of = groups.roles(probe.model)
    names: dict[str, list[str]] = defaultdict(list)
    for name in mean:
        names[role_of.get(name.replace("_orig_mod.", ""), "rest")].append(name)
    whole = _noise(list(mean), squares, mean, dots, size)

    def star(noise: float | None) -> float | None:
        return None if noise is None else overhead * noise + (1 + overhead) * reference

    return {
        "critical_batch": star(whole["noise_scale"]), "critical_batch_low": star(whole["low"]),
        "critical_batch_high": star(whole["high"]), "overhead": overhead, "reference": reference, **whole,
        "layouts": k, "examples_per_layout": size, "tokens_per_example": sum(x.real_tokens for x in layouts) / (k * size),
        "roles": {role: _noise(found, squares, mean, dots, size) for role, found in names.items()},
        "layers": [
            {"layer": n, "role": role, **_noise([n], squares, mean, dots, size)} for role, found in names.items() for n in found
        ],
        "note": None if whole["noise_scale"] else "the gradient cannot be told from noise: use more layouts or examples",
    }  # fmt: skip


def _equal(probe: Probe) -> list[Any]:
    sizes = [len(x.ids) for x in probe.layouts]
    usual = max(sorted(set(sizes)), key=sizes.count, default=0)
    found = [x for x in probe.layouts if len(x.ids) == usual]
    if len(found) < 2:
        raise UsageError(
            f"the noise scale needs two or more layouts with equally many examples, not {sizes}",
            hint="Lower train.micro_batch, or give more data.",
        )  # fmt: skip
    return found


def _mean(probe: Probe, layouts: list[Any]) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The mean gradient, and squared norms by tensor of every layout's."""
    mean: dict[str, Tensor] = {}
    squares = []
    for layout in layouts:
        gradient = probe.gradient(layout)
        squares.append(_products(gradient, gradient))
        for name, g in gradient.items():
            share = g.detach().to(torch.promote_types(g.dtype, torch.float32)) / len(layouts)
            mean[name] = mean[name].add_(share) if name in mean else share
    return mean, squares


def _products(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    return {n: float(torch.sum(a[n].double() * b[n].double())) for n in a}


def _noise(
    names: list[str], squares: list[dict[str, float]], mean: Mapping[str, Tensor], dots: list[dict[str, float]], size: int
) -> dict[str, float | None]:
    """Noise scale and its interval over some tensors; ``dots`` are the products of every layout's gradient with the mean."""
    k = len(squares)
    each = [sum(q.get(n, 0.0) for n in names) for q in squares]
    whole = sum(float(torch.sum(mean[n].double() ** 2)) for n in names)
    signal, trace = _estimates(k, whole, sum(each) / k, size)
    found = {"noise_scale": trace / signal if signal > 0 and trace > 0 else None, "low": None, "high": None,
             "gradient_squared_norm": signal, "gradient_variance": trace}  # fmt: skip
    if not dots or trace <= 0:
        return found
    ratios = []
    for q, d in zip(each, (sum(d.get(n, 0.0) for n in names) for d in dots), strict=True):
        left = (k * k * whole - 2 * k * d + q) / (k - 1) ** 2
        s, t = _estimates(k - 1, left, (sum(each) - q) / (k - 1), size)
        ratios.append(s / t if t > 0 else math.nan)
    middle = sum(ratios) / k
    error = 2 * math.sqrt((k - 1) / k * sum((r - middle) ** 2 for r in ratios))
    lowest, highest = signal / trace - error, signal / trace + error
    return found | {"low": 1 / highest if highest > 0 else None, "high": 1 / lowest if lowest > 0 else None}


def _estimates(k: int, whole: float, single: float, size: int) -> tuple[float, float]:
    """Unbiased ``|G|²`` and ``tr(S)`` from ``|ḡ|²`` and the mean of ``|g_i|²`` over k layouts of ``size`` examples."""
    return (k * whole - single) / (k - 1), size * k * (single - whole) / (k - 1)
