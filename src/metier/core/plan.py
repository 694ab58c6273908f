"""What a run will do and need, before it is started: parts, data, memory by part, time; one real worst-case step."""

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from metier.core import config, resolve
from metier.core.config import Run
from metier.core.data import preview
from metier.core.data.budget import activation_bytes
from metier.core.engine import peak_memory, reset_peak_memory

SHOWN = 2
"""Examples in the preview."""


def plan(run: str | Path | Mapping[str, Any] | Run, overrides: Iterable[str] = (), *, step: bool = True) -> dict[str, Any]:
    """Resolve and check a run, preview its data, and (with ``step``) run its longest and a typical step in a scratch folder.

    Raises what ``train`` would raise. Returns a JSON-able mapping; sizes in bytes, times in seconds.
    """
    from metier.core.session import open_session

    settings, document = config.load(run, overrides)
    with (
        tempfile.TemporaryDirectory() as aside,
        open_session(settings, document, Path(aside) / "plan", quiet=True, handle_signals=False) as session,
    ):
        s: Any = session
        first = _first_items(s)
        out = {
            "parts": resolve.describe(s.resolved),
            "notices": [e["text"] for e in s.log.events() if e["event"] == "notice"],
            "data": _data(s, first),
            "preview": [preview.as_json(s.context.bundle.tokenizer, i) for i in first[:SHOWN]],
            "preview_text": [preview.as_text(s.context.bundle.tokenizer, i) for i in first[:SHOWN]],
        }
        memory = _memory(s)
        if step:
            out["time"] = _timed(s, memory)
        out["memory"] = memory
    return out


def _first_items(s: Any) -> list[Any]:
    loader = s.loader
    if loader.items is not None:
        return list(loader.items)
    found = []
    for item in loader.stream(0, lambda: 0.0):
        found.append(item)
        if len(found) >= 4 * loader.batch:
            break
    return found


def _data(s: Any, items: list[Any]) -> dict[str, Any]:
    clock, loader = s.context.clock, s.loader
    lengths = sorted(i.length for i in items)
    held = [layout for layout in s.eval_layouts]
    return {
        "examples": loader.length, "held out": sum(len(x.ids) for x in held), "steps": clock.steps, "batch": loader.batch,
        "tokens per step": loader.tokens_per_step, "tokens with loss": sum(i.targets for i in items) / max(1, sum(lengths)),
        "length": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "tokens per micro-batch": loader.shape.budget,
    }  # fmt: skip


def _memory(s: Any) -> dict[str, Any]:
    """Bytes by part; activations are an estimate until the step has run."""
    model = s.context.model
    params = list(model.parameters())
    trainable = [p for p in params if p.requires_grad]
    return {
        "weights": sum(p.numel() * p.element_size() for p in params),
        "gradients": sum(p.numel() * p.element_size() for p in trainable),
        "parameters": sum(p.numel() for p in params), "trainable": sum(p.numel() for p in trainable),
        "activations, estimated": activation_bytes(model.config) * _widest(s),
    }  # fmt: skip


def _widest(s: Any) -> int:
    """Tokens, padding included, of the largest micro-batch of the longest examples."""
    return max(layout.input_ids.numel() for layout in _worst(s).micro)


def _timed(s: Any, memory: dict[str, Any]) -> dict[str, Any]:
    """Run the longest examples as one step, then ordinary ones; nothing of it is kept."""
    from metier.core.loop import Loop, own_random_state

    loop = Loop(s)
    device = s.context.engine.device
    before = peak_memory(device)
    reset_peak_memory(device)
    with own_random_state():
        s.context.model.train()
        loop.dispatch("on_start", s.context)
        worst = _run(loop, s, _worst(s))
        memory["optimizer state"] = s.context.optimizer.state_bytes()
        memory["peak measured"] = max(before, peak_memory(device))
        typical = [_run(loop, s, step) for step in islice(s.loader, 2)]
    usual = min(typical, default=worst)
    return {"worst step": worst, "typical step": usual, "whole run": usual * s.context.clock.steps}


def _worst(s: Any) -> Any:
    """A step of the longest examples."""
    items = sorted(_first_items(s), key=lambda i: -i.length)[: s.loader.batch]
    return s.loader._make((items, 0))[0]


def _run(loop: Any, s: Any, step: Any) -> float:
    # Each is a first step: a run of one step has no second one that schedules could be asked about.
    s.context.clock = replace(s.context.clock, step=0, tokens=0)
    began = time.monotonic()
    s.batches = iter([step])
    loop.step()
    return time.monotonic() - began
