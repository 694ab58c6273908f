"""Gradient noise scale: the batch size beyond which larger batches help little (arXiv:1812.06162, appendix
A.1)."""

from typing import Any

import torch
from torch import Tensor

from metier.core.errors import UsageError
from metier.core.part import part
from metier.core.probing import Probe


@part("probe/gradient-noise-scale", paper="arXiv:1812.06162")
def gradient_noise_scale(probe: Probe) -> dict[str, Any]:
    """Simple noise scale ``tr(S) / |G|^2`` from the gradients of layouts (small) and of all of them together
    (big).

    With ``k`` layouts of ``b`` examples, ``B = k b``, ``s`` the mean of ``|G_b|^2`` and ``|G_B|^2`` the
    squared norm of the mean gradient, both estimators are unbiased: ``|G|^2 = (B |G_B|^2 - b s) / (B - b)``
    and ``tr(S) = (s - |G_B|^2) / (1/b - 1/B)``. Their ratio is not; more layouts make it steadier. All in
    examples. Layouts with fewer examples than most are left out. Without dropout, and for one set of weights:
    repeat it during a run.
    """
    layouts = _equal(probe)
    small, count = len(layouts[0].ids), len(layouts)
    big = small * count
    mean: dict[str, Tensor] = {}
    squares = 0.0
    for layout in layouts:
        gradient = probe.gradient(layout)
        squares += _square(gradient) / count
        for name, g in gradient.items():
            share = g.float() / count
            mean[name] = mean[name] + share if name in mean else share
    whole = _square(mean)
    signal = (big * whole - small * squares) / (big - small)
    trace = (squares - whole) / (1 / small - 1 / big)
    return {
        "noise_scale": trace / signal if signal > 0 else None,
        "gradient_squared_norm": signal, "gradient_variance": trace,
        "examples_small": small, "examples_big": big,
        "tokens_per_example": sum(x.real_tokens for x in layouts) / big,
        "note": None if signal > 0 else "the gradient cannot be told from noise: use more examples",
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


def _square(gradient: dict[str, Tensor]) -> float:
    return sum(float(torch.sum(g.double() ** 2)) for g in gradient.values())
