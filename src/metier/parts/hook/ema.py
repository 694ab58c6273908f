"""EMA: an exponential moving average of the weights (Polyak and Juditsky 1992; as used in arXiv:2410.21676)."""

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from metier.core.context import Context
from metier.core.errors import UsageError
from metier.core.part import Beta, Count, part

_SHOWN: "WeakKeyDictionary[nn.Module, EMA]" = WeakKeyDictionary()  # the average in place of a model's weights


@part("hook/ema", paper="arXiv:2410.21676", rows=(6,))
class EMA:
    """``a_t = d a_{t-1} + (1 - d) w_t``; evaluations, and the run's result, use the average ``a``.

    ``start`` says how the first steps are handled: ``copy`` begins at the initial weights (which keep the weight ``d^t``);
    ``debias`` begins at zero and divides by ``1 - d^t``; ``ramp`` uses ``min(d, (1 + t) / (10 + t))`` from the initial weights,
    which soon forgets them. Averages are kept in float32 for every parameter that was trainable at the start: one float32 copy,
    and one more of the weights during an evaluation.

    ``log`` also measures this average whenever the run evaluates (``train.eval_every``, and the last step), as the step's
    metrics ``ema_0.99_loss`` and so on for a decay of 0.99, on steps that ``train.log_every`` selects. So several decays are
    watched in one run, beside its own evaluations of the weights: ``[{ema: {decay: 0.9, use: false, log: true}}, {ema: {decay:
    0.99, use: false, log: true}}]``. Only one may have ``use``. The time of these evaluations counts as training.
    """

    def __init__(
        self,
        *,
        decay: Beta = 0.999,
        start: Literal["copy", "debias", "ramp"] = "copy",
        every: Count = 1,
        use: bool = True,
        log: bool = False,
    ) -> None:
        self.decay, self.start, self.every = decay, start, every
        self.use = use
        """Whether evaluations and the result use the average (else it is only kept)."""
        self.log = log
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._kept: dict[str, Tensor] = {}

    def on_start(self, ctx: Context) -> None:
        """Begin at the weights, or place a loaded average beside them. Raises ``UsageError`` when two averages are to be used."""
        if self.use and sum(map(_used, ctx.run.hooks)) > 1:
            raise UsageError(
                "several ema hooks, but evaluations can use only one average", where="hooks",
                hint="Give all but one of them use: false, and log: true to measure them too.",
            )  # fmt: skip
        loaded = self.average
        self.average = {n: p.detach().float().clone() for n, p in ctx.trainable()}
        if loaded:
            for name, a in self.average.items():
                a.copy_(_like(loaded[name], a))
        elif self.start == "debias":
            torch._foreach_zero_(list(self.average.values()))

    @torch.no_grad()
    def on_step(self, ctx: Context) -> None:
        """Move the average towards the new weights, and measure it where that is asked for."""
        if ctx.clock.step % self.every == 0:
            self._move(ctx)
        period = ctx.run.train.eval_every
        if self.log and (ctx.clock.step == ctx.clock.steps or (period and ctx.clock.step % period == 0)):
            self._show(ctx)
            found = ctx.evaluate()
            self._hide(ctx)
            ctx.metrics.update({f"ema_{self.decay:g}_{n.removeprefix('eval_')}": v for n, v in found.items()})

    def _move(self, ctx: Context) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.start == "ramp" else self.decay
        weights = self._weights(ctx)
        for name, a in self.average.items():
            a.lerp_(weights[name].float(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def on_eval_start(self, ctx: Context) -> None:
        """Put the average in place of the weights."""
        if self.use:
            self._show(ctx)

    def _show(self, ctx: Context) -> None:
        if _SHOWN.setdefault(ctx.model, self) is self and not self._kept:
            weights = self._weights(ctx)
            self._kept = {n: w.detach().clone() for n, w in weights.items()}
            self._put(weights)

    @torch.no_grad()
    def on_eval_end(self, ctx: Context) -> None:
        """Put the weights back, bit for bit."""
        self._hide(ctx)

    def _hide(self, ctx: Context) -> None:
        if _SHOWN.get(ctx.model) is not self:
            return
        del _SHOWN[ctx.model]
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


def _used(ref: Any) -> bool:
    """Whether an entry of the run's hooks is an average that evaluations use."""
    name, options = (ref, None) if isinstance(ref, str) else next(iter(ref.items()))
    return name in ("ema", "hook/ema") and (options or {}).get("use", True)


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[operator]


def _like(value: Tensor, target: Tensor) -> Tensor:
    if hasattr(target, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return value
