"""Progress for people, on stderr: a live line in a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from typing import Any

EVERY = 5.0
"""Seconds between plain step lines; more in long runs, whose output is often kept in a file."""


class Console:
    """Shows a run's events; never the reason that a run fails (a closed terminal only ends the output).

    ``quiet`` shows nothing but events with ``level="warning"``. ``total`` is the last step, when known.
    """

    def __init__(self, quiet: bool = False, total: int | None = None) -> None:
        self.quiet, self.total = quiet, total
        self._live: Any = None
        self._task: Any = None
        self._broken = False
        self._first: tuple[int, float] | None = None
        self._shown = (-1, -float("inf"))
        self._terminal = not quiet and _is_terminal()

    def set_total(self, steps: int) -> None:
        """Say how long the run is."""
        self.total = steps

    def event(self, event: dict[str, Any]) -> None:
        """Show an event of the log."""
        if self._broken or (self.quiet and event.get("level") != "warning"):
            return
        try:
            if event.get("event") == "step":
                self._step(event)
            else:
                self._line(describe(event))
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._break()

    def close(self) -> None:
        """Remove the live line."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def _break(self) -> None:
        self._broken = True
        self.close()

    def _step(self, event: dict[str, Any]) -> None:
        now, step = time.monotonic(), int(event["step"])
        if self._first is None:
            self._first = (step, now)
        text = describe_step(event, self.total, self._left(step, now))
        if self._terminal:
            self._update(step, text, now)
        elif self._due(step, now):
            self._shown = (step, now)
            self._line(text)

    def _left(self, step: int, now: float) -> float | None:
        """Seconds to the last step at the mean speed of this start."""
        assert self._first is not None
        done, seconds = step - self._first[0], now - self._first[1]
        return seconds / done * (self.total - step) if self.total and done > 0 else None

    def _due(self, step: int, now: float) -> bool:
        assert self._first is not None
        last, when = self._shown
        if last < 0 or step == self.total:
            return True
        if now - when >= max(EVERY, (now - self._first[1]) / 100):
            return True
        return bool(self.total) and step * 10 // self.total > last * 10 // self.total

    def _update(self, step: int, text: str, now: float) -> None:
        if self._live is None:
            self._live, self._task = _progress(self.total)
        self._live.update(self._task, completed=step, total=self.total, description=text)
        if now - self._shown[1] >= 0.1 or step == self.total:
            self._shown = (step, now)
            self._live.refresh()

    def _line(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._live.refresh()
        else:
            print(text, file=sys.stderr, flush=True)


def _is_terminal() -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return False


def _progress(total: int | None) -> tuple[Any, Any]:
    """A live line, redrawn only when told to, so that no thread can fail; rich respects ``NO_COLOR``."""
    from rich.console import Console as Rich
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
    live = Progress(*columns, console=Rich(stderr=True), auto_refresh=False, transient=True)
    live.start()
    return live, live.add_task("", total=total)


def describe_step(event: dict[str, Any], total: int | None, left: float | None) -> str:
    """One line: step, loss, learning rate, speed, time left, peak memory; what the event has of these."""
    parts = [f"step {event['step']}" + (f"/{total}" if total else "")]
    if "loss" in event:
        parts.append(f"loss {_number(event['loss'])}")
    if "lr" in event:
        parts.append(f"lr {_number(event['lr'])}")
    if event.get("tokens_per_second"):
        parts.append(f"{_short(event['tokens_per_second'])} tokens/s")
    if left is not None and event["step"] != total:
        parts.append(f"{_duration(left)} left")
    if event.get("memory"):
        parts.append(f"{event['memory'] / 1e9:.1f} GB")
    return "  ".join(parts)


def describe(event: dict[str, Any]) -> str:
    """One line for any event that is not a step."""
    kind, step = event.get("event"), event.get("step")
    at = f"step {step}: " if step is not None else ""
    if kind == "eval":
        hidden = ("event", "step", "time", "tokens", "elapsed")
        return at + ", ".join(f"{k} {_number(v)}" for k, v in event.items() if k not in hidden and isinstance(v, int | float))
    if kind == "checkpoint":
        return f"{at}saved {event.get('name') or 'a checkpoint'}"
    if kind == "guard" or event.get("level") == "warning":
        return f"warning: {at if kind != 'guard' else ''}{event.get('text', '')}"
    return f"{at}{event.get('text', '')}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _short(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
