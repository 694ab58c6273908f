"""Norms of weights, inputs, outputs and input gradients in every block, and attention logits (arXiv:2410.16682)."""

import math
from collections import defaultdict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metier.core import models
from metier.core.attention import Seen, observed
from metier.core.layout import Layout
from metier.core.part import part
from metier.core.probing import Probe
from metier.core.sublayers import GROUPS, attentions, layers, linear

WHERE = "probe/activation-norms"


@part("probe/activation-norms", paper="arXiv:2410.16682", rows=(9,))
def activation_norms(probe: Probe, *, scale: Literal["log2", "linear"] = "log2", gradients: bool = True) -> dict[str, Any]:
    """Per block, for QKV, Proj (after attention), FC1 (gate and up) and FC2: L2 norms of ``W``, ``X``, ``Y``, ``dL/dX``.

    ``weight`` is the Frobenius norm of the matrices of a group together; ``input``, ``output`` and ``input_gradient`` are
    means over real tokens of the norm of the token's vector (the outputs of a group, such as queries, keys and values,
    are one vector), in ``log2`` unless ``scale: linear``. ``L`` is the sum of the loss over a layout, so gradients do not
    shrink with its size; ``None`` where nothing before the layer is trainable. Outputs are those of the linear layers,
    before any norm or scale that a guard put behind them. With them ``max_logit``: ``max |q·k| / sqrt(d)`` before caps,
    and ``entropy`` [nats] of attention, both plain numbers; everything over all layouts of the probe.

    A run that will diverge shows outputs of QKV, Proj and FC2 more than twice those of one that will not, early, and
    input gradients of QKV and FC1 that explode. Cost: forward and backward pass of each layout, and the attention
    products once more in slices. Raises ``UsageError`` for blocks it does not know.
    """
    blocks = models.blocks(probe.model)
    places = [layers(block, WHERE) for block in blocks]
    means = [{g: defaultdict(Mean) for g in GROUPS} for _ in blocks]
    heads = {id(a): (Mean(), [0.0]) for a in attentions(probe.model, WHERE)}
    for layout in probe.layouts:
        _measure(probe, layout.to(probe.engine.device), places, means, heads, gradients)
    found = []
    for where, mean, (entropy, top) in zip(places, means, heads.values(), strict=True):
        row: dict[str, Any] = {g: {"weight": _weight(where[g], scale), **_scaled(mean[g], scale, gradients)} for g in GROUPS}
        found.append({**row, "max_logit": top[0], "entropy": entropy.value})
    return {"scale": scale, "layers": found}


class Mean:
    """A mean over tokens, collected in float64."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        """Add a value for each token."""
        self.sum += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float | None:
        """The mean so far; ``None`` of nothing."""
        return self.sum / self.count if self.count else None


def _measure(probe: Probe, layout: Layout, places: Any, means: Any, heads: Any, gradients: bool) -> None:
    inputs: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    outputs: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    handles = []
    for i, where in enumerate(places):
        for group in GROUPS:
            for n, place in enumerate(where[group]):
                keep = partial(_keep, inputs[i, group] if n == 0 else None, outputs[i, group])
                handles.append(linear(place.module).register_forward_hook(keep))
    real = layout.group > 0
    try:
        seen = observed(probe.model, partial(_see, heads, real), WHERE)
        with seen, torch.set_grad_enabled(gradients), probe.engine.autocast():
            total, _, _ = probe.module(layout)
    finally:
        for handle in handles:
            handle.remove()
    for (i, group), kept in outputs.items():
        squares = torch.stack([y[real].detach().double().square().sum(-1) for y in kept]).sum(0)
        means[i][group]["output"].add(squares.sqrt())
    wanted = [(key, x) for key, kept in inputs.items() for x in kept]
    for (i, group), x in wanted:
        means[i][group]["input"].add(torch.linalg.vector_norm(x[real].detach().double(), dim=-1))
    wanted = [(key, x) for key, x in wanted if x.requires_grad]
    if gradients and wanted:
        found = torch.autograd.grad(total, [x for _, x in wanted], allow_unused=True)
        for ((i, group), _), g in zip(wanted, found, strict=True):
            if g is not None:
                means[i][group]["input_gradient"].add(torch.linalg.vector_norm(g[real].double(), dim=-1))


def _keep(inputs: list[Tensor] | None, outputs: list[Tensor], module: nn.Module, args: Any, out: Tensor) -> None:
    if inputs is not None:
        inputs.append(args[0])
    outputs.append(out)


def _see(heads: Any, real: Tensor, seen: Seen) -> None:
    entropy, top = heads[id(seen.module)]
    rows = real[:, None, :, None].expand(-1, seen.query.shape[1], -1, -1)
    for positions, z, p, visible in seen.rows():
        here = rows[:, :, positions]
        top[0] = max(top[0], float(z.abs().masked_fill(~(here & visible), 0).amax()))
        entropy.add(torch.special.entr(p).sum(-1)[here.squeeze(-1)])


def _weight(group: Any, scale: str) -> float | None:
    squares = sum(float(linear(p.module).weight.detach().double().square().sum()) for p in group)
    return _in(scale, math.sqrt(squares))


def _scaled(mean: Any, scale: str, gradients: bool) -> dict[str, float | None]:
    names = ("input", "output", *(("input_gradient",) if gradients else ()))
    return {n: _in(scale, mean[n].value) for n in names}


def _in(scale: str, value: float | None) -> float | None:
    if value is None or scale == "linear":
        return value
    return math.log2(value) if value > 0 else None
