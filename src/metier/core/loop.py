"""The one training loop. It knows no technique by name.

A step: micro-batches forward and backward, each divided by the units (loss tokens, pairs or examples) of the whole
step, so that the update does not depend on how the batch was split; one check that loss and gradient are finite, before
anything is changed; clipping; the optimizer; events for the run's parts in between.
"""

import contextlib
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from metier.core import checkpoint, guards
from metier.core.context import Context, derive_seed
from metier.core.engine import peak_memory
from metier.core.errors import UsageError
from metier.core.events import Dispatcher
from metier.core.session import Session
from metier.core.wholebatch import empty, nothing, whole, whole_value


@dataclass
class Outcome:
    """How a run ended."""

    status: str
    """``done``, ``interrupted`` or ``ended`` (the data or the time ran out first)."""
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    signal: int | None = None


class _NotFinite(Exception):
    """Leaves a closure whose loss or gradient is not finite."""


class Loop:
    """Runs a :class:`~metier.core.session.Session` to its last step."""

    def __init__(self, session: Session) -> None:
        self.s = session
        self.ctx: Context = session.context
        self.ctx.evaluate = self.evaluate
        self.ctx.optimizer.sampler = self._sampled_gradients  # type: ignore[attr-defined]
        self.dispatch = Dispatcher(session.listeners)
        self.local = self._local()
        self.inner: Any = getattr(self.ctx.module, "module", self.ctx.module)
        """The loss module without what wraps it for several processes."""
        self.after_step: list[Any] = [m.after_step for m in self.ctx.model.modules() if hasattr(m, "after_step")]
        self.guard = guards.NonFinite(self.ctx.run.train.on_nonfinite, self.ctx.run.train.max_skips)
        logged = session.log.events()
        self.ctx.metrics = {k: v for k, v in _newest(logged, "step").items() if k not in ("event", "step", "time")}
        self.last_eval: dict[str, float] = {k: v for k, v in _newest(logged, "eval").items() if k.startswith("eval_")}
        """Of this run's earlier starts too: one that is already at its end keeps its result."""
        self.finite = True
        self.started = time.monotonic()
        self.step_flops = 0.0
        self.elapsed = self.ctx.metrics.get("elapsed", 0.0)
        """Seconds spent in training steps, evaluation and saving left out; goes on after a resume."""

    def run(self) -> Outcome:
        """Train until the last step, a signal, or the end of the data; always leaves a checkpoint."""
        ctx, train = self.ctx, self.ctx.run.train
        self.started = time.monotonic()
        status = "done"
        with own_random_state():
            ctx.model.train()
            self.dispatch("on_start", ctx)
            while ctx.clock.step < ctx.clock.steps:
                if self._stopping():
                    status = "interrupted"
                    break
                if train.max_seconds and self._over(train.max_seconds):
                    status = "ended"
                    ctx.emit({"event": "notice", "text": f"stopped after max_seconds={train.max_seconds:g}"})
                    break
                if not self._counted_step():
                    status = "ended"
                    break
                self._periodic(train)
            if status != "interrupted" and self.s.eval_layouts and self.s.log.last_step("eval") != ctx.clock.step:
                self._log_eval()
            self.save()
            if status != "interrupted":
                self.dispatch("on_end", ctx)
        return Outcome(status, ctx.clock.step, {**_numbers(ctx.metrics), **self.last_eval}, self.s.stop.signal)

    def _local(self) -> set[int]:
        """Parameters, by ``id``, whose gradients stay each process's own."""
        local = {id(p) for p in self.ctx.optimizer.local()}  # type: ignore[attr-defined]
        if local and self.ctx.engine.world > 1 and self.ctx.engine.strategy == "fsdp":
            raise UsageError("this optimizer averages gradients itself: it cannot be used with sharded weights",
                             where="train.strategy", hint="Use ddp.")  # fmt: skip
        return local if self.ctx.engine.world > 1 else set()

    def _counted_step(self) -> bool:
        """A step; the first one counts matrix-product FLOPs when the session asks for it."""
        if not self.s.count_flops or self.step_flops:
            return self.step()
        from metier.core import flops

        with flops.counter() as counted:
            done = self.step()
        self.step_flops = float(counted.get_total_flops())
        return done

    # --- one step ----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One optimizer step. ``False`` when the data have ended."""
        ctx, s = self.ctx, self.s
        began = time.monotonic()
        ctx.clock = replace(ctx.clock, tokens_per_step=s.loader.tokens_per_step)
        batch = next(s.batches, None)
        if ctx.engine.any(batch is None):
            ctx.emit({"event": "notice", "step": ctx.clock.step, "text": s.loader_end_reason()})
            return False
        assert batch is not None
        ctx.layouts = [layout.to(ctx.engine.device) for layout in batch.micro]
        self.dispatch("on_batch", ctx, ctx.layouts)
        lr = s.set_lr(ctx.clock)
        self.inner.begin_step(ctx.clock.progress)
        if s.needs_closure:
            updated, totals = self._closure_step(batch)
        else:
            updated, totals = self._gradient_step(batch)
        if updated:
            for after in self.after_step:
                after()
        tokens = int(totals.pop("_tokens"))
        ctx.clock = replace(ctx.clock, step=ctx.clock.step + 1, tokens=ctx.clock.tokens + tokens)
        seconds = time.monotonic() - began
        self.elapsed += seconds
        ctx.metrics = {
            **totals, "lr": lr, "tokens": ctx.clock.tokens, "units": batch.units,
            "seconds": seconds, "elapsed": self.elapsed, "tokens_per_second": tokens / max(seconds, 1e-9),
            "memory": peak_memory(ctx.engine.device),
        }  # fmt: skip
        if updated:
            self.dispatch("on_step", ctx)
        if ctx.clock.step % ctx.run.train.log_every == 0 or ctx.clock.step == ctx.clock.steps:
            ctx.emit({"event": "step", "step": ctx.clock.step, **ctx.metrics})
        return True

    def _gradient_step(self, batch: Any) -> tuple[bool, dict[str, float]]:
        ctx = self.ctx
        losses, sums = self._evaluated(batch, backward=True)
        trainable = [p for _, p in ctx.trainable()]
        norm = ctx.engine.grad_norm(trainable)
        if self.local:
            norm = ctx.engine.largest(norm)  # one factor for clipping, and one opinion on what is finite
        totals = self._totals(losses, sums, norm, batch)
        if not self._check(totals, batch):
            ctx.optimizer.zero_grad(set_to_none=True)
            return False, totals
        self._clip(trainable, totals["grad_norm"])
        self.dispatch("on_gradients", ctx)
        ctx.optimizer.observe(loss=totals["loss"], progress=ctx.clock.progress)  # type: ignore[attr-defined]
        ctx.optimizer.step()
        ctx.optimizer.zero_grad(set_to_none=True)
        return True, totals

    def _closure_step(self, batch: Any) -> tuple[bool, dict[str, float]]:
        """For rules that evaluate the loss themselves: ``closure(backward=False)`` gives the mean loss of this step.

        A loss that is not finite leaves the closure as an exception, so that the rule puts its weights back.
        """
        ctx = self.ctx
        seen: list[dict[str, float]] = []

        def closure(backward: bool = False) -> float:
            with torch.set_grad_enabled(backward):
                losses, sums = self._evaluated(batch, backward)
            norm = ctx.engine.grad_norm([p for _, p in ctx.trainable()]) if backward else torch.zeros(())
            seen.append(self._totals(losses, sums, norm, batch))
            if not math.isfinite(seen[-1]["loss"] + seen[-1]["grad_norm"]):
                raise _NotFinite
            return seen[-1]["loss"]

        try:
            ctx.optimizer.step(closure)  # type: ignore[arg-type]
        except _NotFinite:
            self._check(seen[-1], batch)
            return False, seen[-1]
        finally:
            ctx.optimizer.zero_grad(set_to_none=True)
        self._check(seen[0], batch)
        return True, seen[0]

    def _evaluated(self, batch: Any, backward: bool) -> tuple[list, dict]:
        """Loss sums and metric sums of all micro-batches, with the same randomness at every call within a step."""
        ctx, engine = self.ctx, self.ctx.engine
        losses, sums, slopes = [], {}, [None] * len(ctx.layouts)
        self._seed()
        if self._splits_whole():
            total, sums, slopes = self._whole(ctx.layouts)
            losses.append(total)
            self._seed()
        for i, layout in enumerate(ctx.layouts):
            with engine.accumulating(ctx.module, last=i == len(ctx.layouts) - 1 and not self.local):
                with engine.autocast():
                    total, _, metrics = ctx.module(layout) if slopes[i] is None else ctx.module(layout, slopes=slopes[i])
                if backward:
                    (total * (engine.world / batch.units)).backward()
            losses.append(total.detach())  # of a whole step's loss, which is known already, what is added to it
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value
        if backward and self.local:
            engine.average_(p.grad for _, p in ctx.trainable() if p.grad is not None and id(p) not in self.local)
        return losses, sums

    def _splits_whole(self) -> bool:
        """Whether a loss of the whole step has to be put together from several parts."""
        return "batch" in self.inner.needs and (len(self.ctx.layouts) > 1 or self.ctx.engine.world > 1)

    @torch.no_grad()
    def _whole(self, layouts: list) -> tuple[torch.Tensor, dict, list]:
        """This process's share of the loss and metric sums of the whole step, and the slopes of each micro-batch."""
        engine = self.ctx.engine
        with engine.autocast():
            scored = [self.ctx.module(layout, scores_only=True) for layout in layouts]
        real = [b for b, layout in zip(scored, layouts, strict=True) if not layout.filler]
        found = whole(self.inner.loss, real or [empty(scored[0])], engine.gather, engine.rank)
        given = iter(found.slopes)
        slopes = [nothing(b) if x.filler else next(given) for b, x in zip(scored, layouts, strict=True)]
        return found.total / engine.world, {k: v / engine.world for k, v in found.metrics.items()}, slopes

    def _sampled_gradients(self) -> tuple[int, dict[int, torch.Tensor]]:
        """Number of labels drawn from the model in place of this step's targets, and the gradient of the mean
        loss on them, by ``id`` of the parameter.
        """
        ctx, engine = self.ctx, self.ctx.engine
        draw = ctx.generator("labels")
        labels = int(engine.sum([float(sum(len(x.target) for x in ctx.layouts if not x.filler))])[0])
        with ctx.gradients_kept():
            for i, layout in enumerate(ctx.layouts):
                with engine.accumulating(ctx.module, last=i == len(ctx.layouts) - 1), engine.autocast():
                    total, _, _ = ctx.module(layout, draw)
                (total * (engine.world / max(1, labels))).backward()
            return labels, {id(p): p.grad for _, p in ctx.trainable() if p.grad is not None}

    def _totals(self, losses: list, sums: dict, norm: torch.Tensor, batch: Any) -> dict[str, float]:
        """Means over the whole step and world, with a single transfer from the device."""
        names = sorted(sums)
        flat = torch.stack([torch.stack(losses).sum().float(), *(sums[n].float() for n in names), norm.float()])
        values = flat.tolist()
        tokens = float(sum(layout.real_tokens for layout in batch.micro))
        *summed, tokens = self.ctx.engine.sum([*values[:-1], tokens])
        means = [v / batch.units for v in summed]
        return {"loss": means[0], **dict(zip(names, means[1:], strict=True)), "grad_norm": values[-1], "_tokens": tokens}

    def _check(self, totals: dict[str, float], batch: Any) -> bool:
        event = self.guard.check(self.ctx.clock.step, totals["loss"], totals["grad_norm"], batch.ids)
        if event is None:
            return True
        self.ctx.emit(event)
        if event["action"] == "stop":
            raise guards.NonFiniteError(event)
        return False

    def _clip(self, params: list, norm: float) -> None:
        clip = self.ctx.run.train.clip
        if clip is not None and norm > clip:
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], clip / (norm + 1e-6))

    def _seed(self) -> None:
        """Randomness of a step is a function of (seed, step, process): resuming needs no stored generator state."""
        seed = derive_seed(self.ctx.run.train.seed, "step", self.ctx.clock.step, self.ctx.engine.rank)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    # --- between steps -----------------------------------------------------------------------------------------

    def _periodic(self, train: Any) -> None:
        step = self.ctx.clock.step
        if train.eval_every and step % train.eval_every == 0 and self.s.eval_layouts:
            self._log_eval()
        if train.save_every and step % train.save_every == 0:
            self.save()

    def _log_eval(self) -> None:
        self.last_eval = self.evaluate()
        at = {"step": self.ctx.clock.step, "tokens": self.ctx.clock.tokens, "elapsed": self.elapsed}
        self.ctx.emit({"event": "eval", **at, **self.last_eval})
        bad = [k for k, v in self.last_eval.items() if not math.isfinite(v)]
        self.finite = not bad
        if bad:
            self.ctx.emit({"event": "guard", "step": self.ctx.clock.step, "text": f"not finite: {', '.join(bad)}"})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss per unit and mean metrics on the held-out data."""
        ctx = self.ctx
        self.dispatch("on_eval_start", ctx)
        training = [m for m in self.inner.modules() if m.training]
        self.inner.eval()  # the loss module too: an objective with a state observes training steps only
        sums, units = self._evaluation_sums()
        for module in training:  # one by one: a part may keep some in evaluation mode
            module.training = True
        self.dispatch("on_eval_end", ctx)
        names = sorted(sums)
        *totals, units = ctx.engine.sum([*(sums[n] for n in names), units])
        return {f"eval_{n}": v / max(units, 1) for n, v in zip(names, totals, strict=True)}

    def _evaluation_sums(self) -> tuple[dict[str, float], float]:
        """Sums of loss and metrics over held-out rows, and their units; a loss of the whole batch sees all of them."""
        ctx, sums, units = self.ctx, dict[str, float](), 0.0
        layouts = (x.to(ctx.engine.device) for x in self.s.eval_layouts)  # one at a time: together they may not fit
        if "batch" in self.inner.needs:
            with ctx.engine.autocast():
                total, count, metrics = whole_value(self.inner.loss, [ctx.module(x, scores_only=True) for x in layouts])
            return {k: float(v) for k, v in {"loss": total, **metrics}.items()}, float(count)
        for layout in layouts:
            with ctx.engine.autocast():
                total, count, metrics = ctx.module(layout)
            units += count
            for name, value in {"loss": total, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums, units

    def save(self) -> None:
        """Write a checkpoint of everything the run needs to continue."""
        if self.s.log.last_step("checkpoint") == self.ctx.clock.step:
            return
        path = checkpoint.save(self.s, finite=self.finite)
        self.ctx.emit({"event": "checkpoint", "step": self.ctx.clock.step, "name": path})

    def _stopping(self) -> bool:
        return self.ctx.engine.any(self.s.stop.requested)

    def _over(self, seconds: float) -> bool:
        return self.ctx.engine.any(time.monotonic() - self.started > seconds)


def _newest(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((e for e in reversed(events) if e["event"] == name), {})


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """The caller's generators are as before when the run is over."""
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])
