"""Loss-spike monitor: says when the training loss jumps, and when a run has diverged (arXiv:2410.16682)."""

from statistics import median
from typing import Any, Literal

from metier.core.context import Context
from metier.core.divergence import Divergence
from metier.core.errors import MetierError
from metier.core.part import Count, Fraction, Positive, part

NORMAL = 1.4826
"""Median absolute deviation -> standard deviation of a normal distribution."""


@part("hook/loss-spike", paper="arXiv:2410.16682", rows=(9,))
class LossSpike:
    """A loss more than ``deviations`` robust deviations above the running median is a spike; the run goes on as it would.

    Median ``m`` and deviation ``s = max(1.4826 MAD, floor |m|)`` are of the last ``window`` losses before this one, after
    the first ``warmup`` steps. Steps above ``m + deviations s`` in a row are one spike: one ``guard`` event when it begins
    and one ``notice`` when it is over. Spike losses enter the window too, so a plateau becomes the new normal after half a
    window. Diverged is a separate word: a loss that is not finite, a smoothed loss above 1.5 times its minimum for 5 % of
    the run, or one at the end above that at 10 % of the run (``metier.core.divergence``); said once.

    ``action: stop`` ends a diverged run with an error, after the event; ``warn`` only says it. Spikes never stop a run.
    Losses that are not finite are met by ``train.on_nonfinite`` before this monitor sees them. Metrics: ``loss_spike`` (0
    or 1), ``loss_spikes`` (so far). It looks at every step, logged or not, and costs some microseconds.
    """

    def __init__(
        self,
        *,
        deviations: Positive = 6.0,
        window: Count = 50,
        warmup: Count = 20,
        floor: Fraction = 0.01,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        self.deviations, self.window, self.warmup, self.floor, self.action = deviations, window, warmup, floor, action
        self.recent: list[float] = []
        self.spikes = 0
        self.length = 0
        """Steps that the present spike has lasted."""
        self.watch: Divergence | None = None

    def on_start(self, ctx: Context) -> None:
        """Learn how long the run is."""
        self.watch = self.watch or Divergence(ctx.clock.steps)
        self.watch.steps = ctx.clock.steps

    def on_step(self, ctx: Context) -> None:
        """Judge this step's loss, which all processes share."""
        loss = float(ctx.metrics["loss"])
        threshold = self.threshold()
        self._spike(ctx, loss, threshold)
        self.recent = [*self.recent, loss][-self.window :]
        ctx.metrics["loss_spike"] = float(self.length > 0)
        ctx.metrics["loss_spikes"] = float(self.spikes)
        self._divergence(ctx, loss)

    def threshold(self) -> float | None:
        """The loss beyond which the next step counts as a spike; ``None`` during the warmup."""
        if len(self.recent) < min(self.warmup, self.window):
            return None
        middle = median(self.recent)
        spread = NORMAL * median(abs(x - middle) for x in self.recent)
        return middle + self.deviations * max(spread, self.floor * abs(middle))

    def _spike(self, ctx: Context, loss: float, threshold: float | None) -> None:
        step = ctx.clock.step
        if threshold is not None and loss > threshold:
            self.length += 1
            if self.length == 1:
                self.spikes += 1
                text = f"the loss jumped to {loss:.4g}, above {threshold:.4g}"
                more = {"loss": loss, "threshold": threshold, "action": "warn"}
                ctx.emit({"event": "guard", "kind": "loss-spike", "step": step, "text": f"step {step}: {text}", **more})
        elif self.length:
            ctx.emit({"event": "notice", "step": step, "text": f"the loss is back at {loss:.4g} after {self.length} steps"})
            self.length = 0

    def _divergence(self, ctx: Context, loss: float) -> None:
        assert self.watch is not None
        before = self.watch.reason
        reason = self.watch.update(loss)
        if not reason or before:
            return
        text = f"the run has diverged: {reason}"
        ctx.emit({"event": "guard", "kind": "diverged", "step": ctx.clock.step, "text": text, "action": self.action})
        if self.action == "stop":
            raise MetierError(text)

    def state_dict(self) -> dict[str, Any]:
        """The window, the counts, and the watch on divergence."""
        watch = None if self.watch is None else self.watch.state_dict()
        return {"recent": list(self.recent), "spikes": self.spikes, "length": self.length, "watch": watch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.recent = [float(x) for x in state["recent"]]
        self.spikes, self.length = int(state["spikes"]), int(state["length"])
        if state["watch"] is not None:
            self.watch = Divergence(0)
            self.watch.load_state_dict(state["watch"])
