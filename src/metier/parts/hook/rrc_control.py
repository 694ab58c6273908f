"""Relative representation change kept below a bound, layer by layer (Kosson, Messmer & Jaggi 2024)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import shards, targets
from metier.core.context import Context
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.part import Count, Fraction, Positive, part
from metier.parts.hook._layouts import from_tensors, of_first_process, to_tensors


@part("hook/rrc-control", paper="arXiv:2410.23922", rows=(5, 16))
class RRCControl:
    """Shortens the update of a linear layer whose outputs would change by more than ``target``.

    With inputs X ``[tokens, in]`` of a layer ``y = W x`` and the optimizer's ``ΔW``, ``RRC = |ΔW X| / |W X|`` (Frobenius);
    the weights become ``W + c ΔW``, ``c = min(1, target / RRC)``: a learning rate of its own for every layer and step, small
    in the first steps, where gradients agree: a warmup that ends by itself. Controlled are the trainable linear layers
    within the blocks, not their biases, gains, embeddings or head. The optimizer's state is not touched. A layer with
    ``W X = 0`` (zeros at the start) is left alone in that step.

    X: inputs on a fixed probe, the first micro-batch of the run (of the first process; another split of the batches takes
    other rows), at most ``tokens`` positions, in evaluation mode, computed anew for each measurement. In the first step
    these rows are part of the gradient, and their RRC is larger than that of others; later they are data seen once.
    ``every`` > 1 measures on every such step and keeps each layer's c in between; after the fraction ``until`` of the run
    nothing is done any more.

    Logged: ``rrc`` (the layers' largest, before shortening), ``rrc_scale`` (smallest c). Cost: on measuring steps a forward
    pass of one micro-batch and two products ``[tokens, in] · [in, out]`` per layer; memory: a copy of the controlled
    weights and X during the step. State: the probe, a number per layer. Put it before hooks that read new weights. With
    rules that keep lengths (``optimizer/lion-ar``), c < 1 cuts the corner of an angle θ: lengths shrink by up to ``θ²/8``.
    The measure is the paper's; it prints no target. AdamW on a 0.3 M Llama (lr 3e-3) has an ``rrc`` of 0.35 in its first
    steps and 0.1 soon after; ``probe/update-size`` shows what another model has.
    """

    def __init__(self, *, target: Positive = 0.1, every: Count = 1, tokens: Count = 256, until: Fraction = 1.0) -> None:
        self.target, self.every, self.tokens, self.until = target, every, tokens, until
        self._probe: Layout | None = None
        self._scales: dict[str, float] = {}
        self._layers: dict[str, nn.Module] = {}
        self._inputs: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._largest = 0.0

    def on_start(self, ctx: Context) -> None:
        """Find the layers. Raises ``UsageError`` when none can be trained."""
        named = dict(ctx.model.named_modules())
        chosen = {n: named[n] for n in targets.linear_targets(ctx.model)}
        self._layers = {
            n: m for n, m in chosen.items() if isinstance(w := getattr(m, "weight", None), nn.Parameter) and w.requires_grad
        }
        if not self._layers:
            raise UsageError("rrc-control: no linear layer within the blocks has trainable weights", where="hooks")

    def on_batch(self, ctx: Context, layouts: list[Layout]) -> None:
        """Take the probe, and look at what it gives the layers."""
        if self._probe is None:
            self._probe = from_tensors(of_first_process(to_tensors(layouts[0]), ctx.engine))
        self._before, self._inputs = {}, {}
        if self._on(ctx) and ctx.clock.step % self.every == 0:
            self._inputs = self._seen(ctx, self._probe.to(ctx.engine.device))

    def on_gradients(self, ctx: Context) -> None:
        """Keep the weights."""
        if self._on(ctx):
            wanted = {n: m for n, m in self._layers.items() if self._inputs or self._scales.get(n, 1.0) < 1}
            self._before = {n: m.get_parameter("weight").detach().clone() for n, m in wanted.items()}

    @torch.no_grad()
    def on_step(self, ctx: Context) -> None:
        """Measure, and go back part of the way."""
        if self._inputs and not self._before:
            raise UsageError("rrc-control cannot be used with optimizers that evaluate the loss themselves", where="hooks")
        if self._inputs:
            self._measure(ctx)
        for name, old in self._before.items():
            if self._scales[name] < 1:
                new = shards.opened(self._layers[name].get_parameter("weight"), whole=False)
                new.lerp_(shards.opened(old, whole=False), 1 - self._scales[name])
        if self._on(ctx, done=1):
            ctx.metrics |= {"rrc": self._largest, "rrc_scale": min(self._scales.values(), default=1.0)}
        self._before, self._inputs = {}, {}

    def _on(self, ctx: Context, done: int = 0) -> bool:
        return (ctx.clock.step - done) / max(1, ctx.clock.steps) < self.until

    def _measure(self, ctx: Context) -> None:
        found = [self._change(n, m) if n in self._inputs else 0.0 for n, m in self._layers.items()]
        shared = [v / ctx.engine.world for v in ctx.engine.sum(found)]  # replicas must agree to the last bit
        self._largest = max(shared)
        self._scales = {n: min(1.0, self.target / max(v, 1e-30)) for n, v in zip(self._layers, shared, strict=True)}

    def _change(self, name: str, layer: nn.Module) -> float:
        """RRC of a layer; 0 where there is nothing to compare with."""
        old = shards.opened(self._before[name], whole=True).float()
        delta = shards.opened(layer.get_parameter("weight").detach(), whole=True).float() - old
        x = self._inputs[name].float()
        size, change = (torch.linalg.vector_norm(x @ (w if _transposed(layer) else w.mT)) for w in (old, delta))
        return float(change / size) if size > 0 else 0.0

    @torch.no_grad()
    def _seen(self, ctx: Context, layout: Layout) -> dict[str, Tensor]:
        """Inputs ``[tokens, in]`` of the layers on ``layout``."""
        found: dict[str, Tensor] = {}
        real = (layout.group > 0).flatten()
        handles = [m.register_forward_pre_hook(partial(self._keep, found, n, real)) for n, m in self._layers.items()]
        training = [m for m in ctx.model.modules() if m.training]
        ctx.model.eval()
        try:
            with ctx.engine.autocast():
                ctx.module(layout)
        finally:
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True
        return found

    def _keep(self, found: dict[str, Tensor], name: str, real: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        x = x[real] if len(x) == len(real) else x
        if len(x):
            found[name] = x[:: -(-len(x) // self.tokens)].clone()

    def state_dict(self) -> dict[str, Any]:
        """The probe and the multipliers."""
        probe = {} if self._probe is None else to_tensors(self._probe)
        return {"probe": probe, "scales": dict(self._scales), "rrc": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._probe = from_tensors(state["probe"]) if state["probe"] else None
        self._scales, self._largest = dict(state["scales"]), float(state["rrc"])


def _transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"
