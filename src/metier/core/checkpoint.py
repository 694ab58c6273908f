"""A run's whole state, saved and loaded. The file protocol is ``core/state.py``'s; this says what belongs in it.

Saved: every parameter that was trainable at the start and every persistent buffer; optimizer state; the state of every
part that has one; the position in the data; the clock. Randomness needs no saving (see ``core/context.py``).
Tensors sharded over processes are gathered, so a checkpoint can be resumed at any world size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metier.core import state
from metier.core.clock import Clock
from metier.core.errors import MetierError, UsageError
from metier.core.session import Session
from metier.core.shards import opened, split_like


def save(s: Session, *, finite: bool) -> str | None:
    """Write a checkpoint; all processes take part, the first one writes. Returns its name there."""
    model = {name: opened(t.detach(), whole=True) for name, t in s.saved_tensors()}
    optimizer = s.context.optimizer.full_state_dict()  # type: ignore[attr-defined]
    parts = {name: part.state_dict() for name, part in s.stateful.items()}
    if not s.context.engine.main:
        s.context.engine.barrier()
        return None
    finite = finite and all(bool(torch.isfinite(t).all()) for t in model.values() if t.is_floating_point())
    optim_tensors, optim_json = state.pack(optimizer)
    part_tensors, part_json = state.pack(parts)
    clock = s.context.clock
    meta = {
        "step": clock.step, "tokens": clock.tokens, "seed": s.context.run.train.seed,
        "data": s.loader.state_dict(), "model_fingerprint": s.context.bundle.fingerprint,
        "optimizer": optim_json, "parts": part_json, "made_by": _made_by(s), "world": s.context.engine.world,
    }  # fmt: skip
    path = state.write(
        s.context.folder / "checkpoints", clock.step,
        tensors={"model": model, "optim": optim_tensors, "parts": part_tensors}, meta=meta, finite=finite,
    )  # fmt: skip
    state.rotate(s.context.folder / "checkpoints", s.context.run.train.keep)
    s.context.engine.barrier()
    return path.name


def resume(s: Session, folder: Path | None = None, *, data: bool = True) -> int | None:
    """Load the newest complete checkpoint of ``folder`` (the run's own by default), if there is one. Returns its step.

    ``data=False`` leaves the position in the data alone: the session reads others than the checkpoint's run did.
    """
    ctx = s.context
    folder = folder or ctx.folder
    found = state.find(folder / "checkpoints", log=lambda text: ctx.emit({"event": "notice", "text": text}))
    if found is None:
        return None
    checkpoint = state.read(found)
    meta = checkpoint.meta
    _check_same(s, folder, meta)
    if data:
        s.loader.load_state_dict(meta["data"])
    _load_tensors(s, checkpoint.tensors["model"])
    optimizer = state.unpack(checkpoint.tensors["optim"], meta["optimizer"])
    ctx.optimizer.load_full_state_dict(optimizer)  # type: ignore[attr-defined]
    parts = state.unpack(checkpoint.tensors["parts"], meta["parts"])
    for name, part in s.stateful.items():
        if name not in parts:
            raise MetierError(f"the checkpoint {found.name} has no state of {name}")
        part.load_state_dict(parts[name])
    ctx.clock = Clock(meta["step"], ctx.clock.steps, meta["tokens"], ctx.clock.tokens_per_step)
    return meta["step"]


def _made_by(s: Session) -> dict[str, str]:
    """The parts that a checkpoint's tensors depend on, by kind."""
    r = s.resolved
    bound = {"optimizer": r.optimizer, "objective": r.objective, "adapter": r.adapter}
    return {kind: b.built.id for kind, b in bound.items() if b is not None}


def _check_same(s: Session, folder: Path, meta: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model or of other parts."""
    hint = "Choose another folder with out=…, start afresh with --restart, or restore the original."
    if meta["model_fingerprint"] != s.context.bundle.fingerprint:
        seeded = " (its weights come from train.seed)" if s.context.bundle.source == "lab" else ""
        raise UsageError(f"{folder} was trained from another version of {s.context.bundle.name}{seeded}", hint=hint)
    now, then = _made_by(s), meta["made_by"]
    for kind in sorted({*now, *then}):
        if now.get(kind) != then.get(kind):
            said = f"{then.get(kind, f'no {kind}')}, and now {now.get(kind, f'no {kind}')} is asked for"
            raise UsageError(f"{folder} was trained with {said}", hint=hint)


def _load_tensors(s: Session, stored: Mapping[str, Tensor]) -> None:
    wanted = dict(s.saved_tensors())
    if set(wanted) != set(stored):
        odd = sorted(set(wanted) ^ set(stored))
        raise MetierError(f"the checkpoint does not fit this run: {', '.join(odd[:3])} (of {len(odd)} tensors) on one side only")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(split_like(tensor, stored[name].to(tensor.device)))
