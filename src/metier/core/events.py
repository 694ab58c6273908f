"""The loop's events. Any part (hook, adapter, model, source, objective, optimizer rule) may define these methods.

    on_start(ctx)          before the first step, after a resume has been loaded
    on_batch(ctx, batch)   before the forward passes of a step; ``batch`` is the list of micro-batch layouts
    on_gradients(ctx)      gradients are complete, normalised and finite; the optimizer has not stepped
    on_step(ctx)           the optimizer has stepped; ``ctx.metrics`` holds the step's metrics and may be added to
    on_eval_start(ctx)     before an evaluation: switch to what should be evaluated
    on_eval_end(ctx)       after it: switch back
    on_end(ctx)            after the last step, evaluation and checkpoint, before the result is published

A part with ``state_dict()`` and ``load_state_dict()`` has its state saved with every checkpoint. Order is the order of
the run file, for every event; a run without hooks costs nothing.
"""

from collections.abc import Iterable
from typing import Any

EVENTS = ("on_start", "on_batch", "on_gradients", "on_step", "on_eval_start", "on_eval_end", "on_end")


class Dispatcher:
    """Calls the listeners of an event in order."""

    def __init__(self, parts: Iterable[Any]) -> None:
        parts = list(parts)
        self._calls = {e: [getattr(p, e) for p in parts if callable(getattr(p, e, None))] for e in EVENTS}

    def __call__(self, event: str, *args: Any) -> None:
        """Call every listener of ``event``."""
        for call in self._calls[event]:
            call(*args)
