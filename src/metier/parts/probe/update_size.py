"""How large one update is, layer by layer, by the three measures of Kosson, Messmer & Jaggi (2024)."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import optim, targets
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.part import Count, NonNegative, Positive, build, part
from metier.core.probing import Probe

MEASURES = ("rms", "l2", "angle", "rrc", "snr")


@part("probe/update-size", paper="arXiv:2410.23922", rows=(5, 16))
def update_size(
    probe: Probe,
    *,
    rule: str | dict[str, dict[str, Any]] = "adamw",
    lr: Positive | None = None,
    weight_decay: NonNegative = 0.1,
    tokens: Count = 256,
) -> dict[str, Any]:
    """Size of the update ΔW that an optimizer part, fresh, makes of the mean gradient of the layouts.

    For every trainable tensor of two or more dimensions: ``rms`` of ΔW over the learning rate (1 for AdamW's first step,
    √κ for LionA's); ``l2`` = ``|ΔW|``; ``angle`` between W and W + ΔW in radians; for linear layers ``rrc`` =
    ``|ΔW X| / |W X|`` with X ``[tokens, in]`` the layer's inputs on the last layout, which is left out of the gradient when
    there are three or more (``held_out``); ``snr``, the signal-to-noise ratio of that gradient: with k layouts, mean
    ``ḡ`` and s the mean of ``|g_i|²``, signal ``(k|ḡ|² - s)/(k-1)`` over noise ``(s - |ḡ|²)/(k-1)``, both unbiased (their
    ratio is not); layouts weigh equally. ``median`` and ``largest`` are over the tensors; None: no value. Warmup
    keeps steps small early, where the signal is strong: compare learning rates, rules and stages of a run.

    ``rule``: an optimizer, by name or ``{name: {option: value}}``; ``lr`` is its default when not given. Its state is new:
    this is a first step, not the next one of the run. Memory: one copy of the weights and of the gradient.
    """
    gradient, snr, used = _gradient(probe)
    trained = {n: p for n, p in probe.model.named_parameters() if n in gradient and p.ndim > 1}
    layers = {f"{n}.weight": m for n, m in probe.model.named_modules() if targets.is_linear(m) and f"{n}.weight" in trained}
    inputs = _inputs(probe, layers, probe.layouts[-1], tokens)
    rows = []
    with _updated(probe, gradient, rule, lr, weight_decay) as (before, peak):
        for name, p in trained.items():
            size = _sizes(before[name], p.detach(), peak)
            size["rrc"] = _rrc(layers[name], before[name], inputs[name]) if name in inputs else None
            rows.append({"layer": name, **size, "snr": snr[name]})
    return {
        "lr": peak, "gradient_layouts": used, "held_out": used < len(probe.layouts),
        **{f"{word}_{m}": _over(rows, m, f) for m in MEASURES for word, f in (("median", median), ("largest", max))},
        "layers": rows,
    }  # fmt: skip


def _gradient(probe: Probe) -> tuple[dict[str, Tensor], dict[str, float | None], int]:
    """Mean gradient, its signal-to-noise ratio per tensor, and the number of layouts in it."""
    layouts = list(probe.layouts)
    if not layouts:
        raise UsageError("update-size needs data", hint="Give data.eval or data.eval_fraction, or probe --on train.")
    layouts = layouts[:-1] if len(layouts) > 2 else layouts
    k, mean, squares = len(layouts), {}, {}
    for layout in layouts:
        for name, g in probe.gradient(layout).items():
            wide = g.double() if g.dtype == torch.float64 else g.float()
            mean[name] = mean[name].add_(wide, alpha=1 / k) if name in mean else wide / k
            squares[name] = squares.get(name, 0.0) + _square(wide) / k
    return mean, {n: _snr(k, _square(g), squares[n]) for n, g in mean.items()}, k


def _square(t: Tensor) -> float:
    return float(torch.sum(t.double() ** 2))


def _snr(k: int, whole: float, single: float) -> float | None:
    noise = single - whole
    return max(0.0, k * whole - single) / noise if k > 1 and noise > 0 else None


@contextmanager
def _updated(
    probe: Probe, gradient: Mapping[str, Tensor], rule: Any, lr: float | None, weight_decay: float
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """The model after one step, with its weights before it and the learning rate; as it was, bit for bit, afterwards."""
    built = build("optimizer", rule)
    if hasattr(built.obj, "step"):
        raise UsageError(f"{built.id} evaluates the loss itself: it has no update of one gradient", where="rule")
    optimizer = optim.build(probe.model, built, lr=lr, weight_decay=weight_decay)
    moved = {n: p for n, p in probe.model.named_parameters() if n in gradient}
    before = {n: p.detach().clone() for n, p in moved.items()}
    try:
        for name, p in moved.items():
            p.grad = gradient[name].to(p.dtype)
        optimizer.step()
        yield before, float(lr or optim.default_lr(built.obj))
    finally:
        with torch.no_grad():
            for name, p in moved.items():
                p.copy_(before[name])
                p.grad = None


def _sizes(old: Tensor, new: Tensor, lr: float) -> dict[str, float | None]:
    a, b = old.double().flatten(), new.double().flatten()
    delta, length = b - a, float(torch.linalg.vector_norm(a))
    l2 = float(torch.linalg.vector_norm(delta))
    # By the tangent: the cosine of a small angle has lost its digits.
    along = float(a @ b) / length if length else 0.0
    angle = math.atan2(float(torch.linalg.vector_norm(b - a * (along / length))), along) if length else None
    return {"rms": l2 / math.sqrt(max(1, a.numel())) / lr, "l2": l2, "angle": angle}


def _rrc(layer: nn.Module, old: Tensor, x: Tensor) -> float | None:
    delta = layer.get_parameter("weight").detach() - old
    both = [w.float() if type(layer).__name__ == "Conv1D" else w.float().mT for w in (old, delta)]
    size, change = (float(torch.linalg.vector_norm(x.float() @ w)) for w in both)
    return change / size if size > 0 else None


def _inputs(probe: Probe, layers: Mapping[str, nn.Module], layout: Layout, tokens: int) -> dict[str, Tensor]:
    """Inputs ``[tokens, in]`` of linear layers, padding left out, evenly spaced when there are more."""
    found: dict[str, Tensor] = {}
    real = (layout.group > 0).flatten()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            x = x[real.to(x.device)] if len(x) == len(real) else x
            if len(x):
                found[name] = x[:: -(-len(x) // tokens)].clone()

        return hook

    handles = [m.register_forward_pre_hook(keep(n)) for n, m in layers.items()]
    try:
        probe.loss(layout)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _over(rows: list[dict[str, Any]], measure: str, summary: Callable[[list[float]], float]) -> float | None:
    values = [r[measure] for r in rows if r[measure] is not None]
    return summary(values) if values else None
