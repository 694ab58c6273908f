"""EMA: an exponential moving average of the weights (Polyak and Juditsky 1992; as used in
arXiv:2410.21676)."""

from typing import Any, Literal

import torch
from torch import Tensor

from metier.core.context import Context
from metier.core.part import Beta, Count, part


@part("hook/ema", paper="arXiv:2410.21676", rows=(6,))
class EMA:
    """``a_t = d a_{t-1} + (1 - d) w_t``; evaluations, and the run's result, use the average ``a``.

    ``start`` says how the first steps are handled: ``copy`` begins at the initial weights (which keep the
    weight ``d^t``); ``debias`` begins at zero and divides by ``1 - d^t``; ``ramp`` uses ``min(d, (1 + t) /
    (10 + t))`` from the initial weights, which soon forgets them. Averages are kept in float32 for every
    parameter that was trainable at the start: one float32 copy, and one more of the weights during an
    evaluation.
    """

    def __init__(
        self,
        *,
        decay: Beta = 0.999,
        start: Literal["copy", "debias", "ramp"] = "copy",
        every: Count = 1,
        use: bool = True,
    ) -> None:
        self.decay, self.start, self.every = decay, start, every
        self.use = use
        """Whether evaluations and the result use the average (else it is only kept)."""
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._kept: dict[str, Tensor] = {}

    def on_start(self, ctx: Context) -> None:
        """Begin at the weights, or place a loaded average beside them."""
        loaded = self.average
        self.average = {n: p.detach().float().clone() for n, p in ctx.trainable()}
        if loaded:
            for name, a in self.average.items():
                a.copy_(_like(loaded[name], a))
        elif self.start == "debias":
            torch._foreach_zero_(list(self.average.values()))

    @torch.no_grad()
    def on_step(self, ctx: Context) -> None:
        """Move the average towards the new weights."""
        if ctx.clock.step % self.every:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.start == "ramp" else self.decay
        weights = self._weights(ctx)
        for name, a in self.average.items():
            a.lerp_(weights[name].float(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def on_eval_start(self, ctx: Context) -> None:
        """Put the average in place of the weights."""
        if self.use and not self._kept:
            weights = self._weights(ctx)
            self._kept = {n: w.detach().clone() for n, w in weights.items()}
            self._put(weights)

    @torch.no_grad()
    def on_eval_end(self, ctx: Context) -> None:
        """Put the weights back, bit for bit."""
        weights = self._weights(ctx)
        for name, kept in self._kept.items():
            weights[name].copy_(kept)
        self._kept = {}

    @torch.no_grad()
    def on_end(self, ctx: Context) -> None:
        """The result of the run is the average."""
        if self.use:
            self._put(self._weights(ctx))

    def _weights(self, ctx: Context) -> dict[str, Tensor]:
        # By name and not by requires_grad: another part may have frozen some of them for the moment.
        return {n: p for n, p in ctx.model.named_parameters() if n in self.average}

    def _put(self, weights: dict[str, Tensor]) -> None:
        if self.start == "debias" and self.updates == 0:
            return
        scale = 1 - self.decay**self.updates if self.start == "debias" else 1.0
        for name, a in self.average.items():
            weights[name].copy_(a / scale)

    def state_dict(self) -> dict[str, Any]:
        """The averages (whole tensors) and the number of updates."""
        return {"updates": self.updates, "average": {n: _whole(a) for n, a in self.average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved average; ``on_start`` places it."""
        self.updates = int(state["updates"])
        self.average = dict(state["average"])


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[operator]


def _like(value: Tensor, target: Tensor) -> Tensor:
    if hasattr(target, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return value
