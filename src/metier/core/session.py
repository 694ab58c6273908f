"""A run assembled: model, adapter, data, optimizer, listeners and folder, ready for the loop."""

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import engine as engines
from metier.core import kernel, models, resolve, separate, trained
from metier.core.clock import Clock
from metier.core.config import Run
from metier.core.context import Context, derive_seed
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.lossmodule import LossModule
from metier.core.reference import ReferenceModel
from metier.core.resolve import Resolved
from metier.core.runfolder import FORMAT, command_line, environment, publish, write_json
from metier.core.schedule import Schedule
from metier.core.scores import reference_scorer
from metier.core.yamlfile import Document


@dataclass
class Session:
    """Everything a run holds while it trains."""

    context: Context
    resolved: Resolved
    loader: Any
    eval_layouts: list[Layout]
    schedule: Schedule
    listeners: list[Any]
    stateful: dict[str, Any]
    """Parts with state, by a name that stays the same between starts."""
    log: Any
    stop: Any
    needs_closure: bool
    count_flops: bool = False
    held_out: list[Any] = field(default_factory=list)
    """The held-out examples, before encoding."""
    record: dict[str, Any] = field(default_factory=dict)
    batches: Iterator[Any] = field(default_factory=lambda: iter(()))
    _saved: list[tuple[str, Tensor]] = field(default_factory=list)

    def saved_tensors(self) -> list[tuple[str, Tensor]]:
        """What was trainable at the start, and persistent buffers: the tensors of a checkpoint."""
        return self._saved

    def set_lr(self, clock: Clock) -> float:
        """Set every group's learning rate for this step; returns the first group's."""
        groups = self.context.optimizer.param_groups
        multiplier = self.schedule.at(clock)
        for group in groups:
            group["lr"] = group["initial_lr"] * multiplier
        return float(groups[0]["lr"])

    def loader_end_reason(self) -> str:
        """Why there are no more batches."""
        return getattr(self.loader, "end_reason", None) or "the data have ended before the last step"

    def write_record(self, **changes: Any) -> None:
        """Update ``run.json``."""
        self.record.update(changes)
        if self.context.engine.main:
            write_json(self.context.folder / "run.json", self.record)

    def train(self, *, keep_weights: bool) -> Any:
        """Run the loop and publish the result."""
        from metier.core import checkpoint
        from metier.core.api import Result
        from metier.core.basegrad import start_adapters
        from metier.core.loop import Loop

        ctx = self.context
        resumed = checkpoint.resume(self)
        before = 0.0 if resumed is None else _seconds_before(ctx.folder)
        if resumed is None:
            start_adapters(self)
        self.log.start(resumed or 0, ctx.clock.steps)
        if resumed is not None:
            ctx.emit({"event": "notice", "step": resumed, "text": f"continuing after step {resumed} of {ctx.clock.steps}"})
        self.batches = iter(self.loader)
        self.write_record(status="running", step=ctx.clock.step)
        began = time.monotonic()
        loop = Loop(self)
        outcome = loop.run()
        if outcome.status != "interrupted" and keep_weights:
            self.publish_result()
        seconds = before + time.monotonic() - began
        self.write_record(status=outcome.status, step=outcome.step, metrics=outcome.metrics, seconds=seconds)
        return Result(
            ctx.folder, outcome.status, outcome.step, outcome.metrics, self.log.events(), outcome.signal,
            flops=loop.step_flops * ctx.clock.steps, peak_bytes=engines.peak_memory(ctx.engine.device),
            state_bytes=ctx.optimizer.state_bytes(),  # type: ignore[attr-defined]
            params=sum(p.numel() for n, p in self.saved_tensors() if p.requires_grad), main=ctx.engine.main,
        )  # fmt: skip

    def publish_result(self) -> None:
        """Write ``adapter/`` (PEFT's format where it can be expressed) or ``model/``, complete or not at all.

        Every process fills a folder, because sharded weights are gathered on the way; the first one's is kept.
        """
        ctx = self.context
        name, fill = ("model", partial(models.save, ctx.bundle)) if ctx.attached is None else ("adapter", ctx.attached.save)
        if ctx.engine.main:
            publish(ctx.folder / name, fill)
        elif ctx.engine.strategy == "fsdp":
            with tempfile.TemporaryDirectory() as aside:
                fill(Path(aside))
        ctx.engine.barrier()


@contextlib.contextmanager
def open_session(
    run: Run, document: Document, folder: Path, *, quiet: bool = False, fresh: bool = False, handle_signals: bool = True
) -> Iterator[Session]:
    """Assemble a run; on leaving, the folder's lock, the log and the process group are released.

    Raises ``UsageError`` for whatever is wrong with the request: parts and options first, then data, then the model.
    """
    from metier.core import lock, log, signals
    from metier.core.console import Console

    resolved = resolve.resolve(run, document)
    models.check(run.model)
    engine = engines.start(run.train.device, run.train.precision, run.train.strategy)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        engines.reset_peak_memory(engine.device)
        taken_over = None
        if engine.main:
            taken_over = stack.enter_context(lock.run_folder(folder))
            if fresh:
                _clear(folder)
        engine.barrier()
        console = Console(quiet=quiet or not engine.main)
        stack.callback(console.close)
        journal = stack.enter_context(log.RunLog(folder, sinks=run.sinks, console=console, write=engine.main))
        if taken_over:
            journal.emit({"event": "notice", "text": taken_over})
        stop = stack.enter_context(signals.Stop(enabled=handle_signals))
        session = assemble(resolved, folder, engine, journal, stop)
        try:
            yield session
        except BaseException as e:
            if session.record.get("status") == "running":
                session.write_record(status="failed", error=f"{type(e).__name__}: {e}")
            raise


def assemble(resolved: Resolved, folder: Path, engine: engines.Engine, journal: Any, stop: Any) -> Session:
    """Build model, adapter, data, optimizer and context of a run."""
    from metier.core.data.pipeline import open_data
    from metier.core.optim import build as build_optimizer

    run = resolved.run
    data = open_data(resolved, engine, notice=lambda text: journal.emit({"event": "notice", "text": text}))
    _check_some_loss(data, run)
    bundle = models.load(run.model, task=data.task, num_labels=data.num_labels, dtype=_dtype(run.dtype), seed=run.train.seed)
    bundle.model.to(engine.device)
    watched = bool(run.transform or run.hooks)
    kernel.choose(bundle.model, run.train.attention, grouped=data.grouped, watched=watched, notice=data.notice)
    bundle, attached = _transform(resolved, bundle)
    reference = _reference(resolved, bundle, attached, engine)
    kept = _kept_scores(reference, resolved, bundle, engine, data.notice) if reference else None
    loader, eval_layouts = data.encode(bundle, kept, reference.initial if reference else None, folder)
    reference = None if kept else reference
    module = LossModule(bundle.model, resolved.objective.built, reference)
    if not any(p.requires_grad for p in bundle.model.parameters()):
        raise UsageError("no parameter is trainable")
    wrapped = engine.wrap(module, models.blocks(bundle.model) if engine.strategy == "fsdp" else ())
    optimizer = build_optimizer(
        bundle.model, resolved.optimizer.built, attached=attached, check_finite=False, **resolved.optimizer.common
    )
    steps = _steps(run, loader)
    loader.expected = loader.examples_in(steps)
    context = Context(
        run, bundle, engine, optimizer, wrapped, folder,
        Clock(0, steps, 0, loader.tokens_per_step), journal.emit, dict, attached, reference,
    )  # fmt: skip
    if "closure" in resolved.needs and run.train.clip is not None:
        journal.emit(
            {"event": "notice", "text": f"{resolved.optimizer.built.id} evaluates the loss itself: train.clip is not applied"}
        )
    if run.train.gradient_checkpointing:
        models.checkpoint_activations(bundle.model)
    listeners = [b.built.obj for b in resolved.parts()]
    session = Session(
        context, resolved, loader, eval_layouts, Schedule(resolved.schedule.built, **resolved.schedule.common), listeners,
        _stateful(resolved), journal, stop, "closure" in resolved.needs, held_out=data.held_out,
    )  # fmt: skip
    session._saved = _saved_tensors(bundle.model, attached)
    session.record = _record(session, data.fingerprint)
    return session


def _check_some_loss(data: Any, run: Run) -> None:
    """Refuse data none of whose examples can be trained on, before a large model is loaded for them."""
    if data.settings.chunk or data.settings.source:
        return
    encoder = data.encoder(models.tokenizer_of(run.model))
    if all(encoder(e) is None for part in data.train.values() for e in part):
        encoder.all(())


def _dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _transform(resolved: Resolved, bundle: models.Bundle) -> tuple[models.Bundle, Any]:
    """The bundle with model parts and adapter; their random numbers come from the run's seed."""
    state = torch.get_rng_state()
    torch.manual_seed(derive_seed(resolved.run.train.seed, "init"))
    try:
        return _transformed(resolved, bundle)
    finally:
        torch.set_rng_state(state)


def _transformed(resolved: Resolved, bundle: models.Bundle) -> tuple[models.Bundle, Any]:
    bundle = models.transformed(bundle, [b.built.obj for b in resolved.transforms], resolved.run.transform)
    if resolved.adapter is None:
        return bundle, None
    from metier.core.adapt import attach

    attached = attach(bundle.model, resolved.adapter.built, **resolved.adapter.common)
    return models.replace_model(bundle, attached.model), attached


def _reference(resolved: Resolved, bundle: models.Bundle, attached: Any, engine: engines.Engine) -> ReferenceModel | None:
    """The reference model: the adapter switched off, or a frozen second model."""
    if "reference" not in resolved.needs:
        return None
    found = _frozen(resolved, bundle, attached, engine)
    if engine.sharded and any(getattr(b.built.obj, "moves_reference", False) for b in resolved.parts()):
        found.prepare(bundle.model)
    return found


def _frozen(resolved: Resolved, bundle: models.Bundle, attached: Any, engine: engines.Engine) -> ReferenceModel:
    run = resolved.run
    if run.reference is None and attached is not None:
        score = reference_scorer(bundle.model, attached.disabled)
        return ReferenceModel(score, bundle.name, _start_fingerprint(resolved, bundle))
    if run.reference is None:
        loaded = trained.at_start(run, device=engine.device)
    else:
        loaded = models.load(run.reference, dtype=_dtype(run.dtype), seed=run.train.seed)
    frozen = loaded.model.to(engine.device).requires_grad_(False).eval()
    kernel.follow(frozen, bundle.model)
    score = reference_scorer(frozen, contextlib.nullcontext)
    if run.reference is None:
        return ReferenceModel(score, run.model, _start_fingerprint(resolved, loaded))
    score = separate.scorer(frozen, score, loaded.tokenizer.pad_token_id or 0)  # perhaps of another family than the model
    return ReferenceModel(score, run.reference, loaded.fingerprint)


def _start_fingerprint(resolved: Resolved, bundle: models.Bundle) -> str:
    """Of the model at the start: of what was loaded, and of the model parts that have changed it since."""
    if not resolved.transforms:
        return bundle.fingerprint
    changes = [f"{b.built.id} {sorted(b.built.options.items())}" for b in resolved.transforms]
    told = json.dumps([bundle.fingerprint, changes, resolved.run.train.seed])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _kept_scores(
    reference: ReferenceModel, resolved: Resolved, bundle: models.Bundle, engine: engines.Engine, notice: Any
) -> Any:
    """What gives items their reference scores from a cache, or ``None`` when the run asks for live ones."""
    from metier.core.data.pipeline import tokenizer_fingerprint
    from metier.core.refcache import Identity, KeptScores

    kept = resolved.run.reference_scores
    if kept == "live":
        return None
    if "logits" in resolved.needs:
        raise UsageError(f"{resolved.objective.built.id} reads whole logit rows of the reference, which are not kept",
                         where="reference_scores", hint="Use reference_scores: live.")  # fmt: skip
    template = "".join(tokenizer_fingerprint(bundle.tokenizer).values())
    identity = Identity(reference.name, reference.fingerprint, template)
    return KeptScores(identity, reference.initial, engine, notice, None if kept == "cached" else Path(kept))


def _saved_tensors(model: nn.Module, attached: Any = None) -> list[tuple[str, Tensor]]:
    """What is trainable, and persistent buffers: all of them, or with an adapter its own."""
    persistent = {n for n in model.state_dict(keep_vars=True)}
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own = {id(t) for a in getattr(attached, "adapters", {}).values() for t in a.own_state().values()}
    buffers = [(n, b) for n, b in model.named_buffers() if n in persistent and (attached is None or id(b) in own)]
    return [*params, *buffers]


def _stateful(resolved: Resolved) -> dict[str, Any]:
    named = {}
    for i, b in enumerate(resolved.parts()):
        if hasattr(b.built.obj, "state_dict") and not isinstance(b.built.obj, nn.Module):
            named[f"{i}:{b.built.id}"] = b.built.obj
    return named


def _steps(run: Run, loader: Any) -> int:
    train = run.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return loader.steps_for(train.tokens / loader.mean_length)
    if loader.length is None:
        raise UsageError("a source has no epochs: give train.steps or train.tokens")
    assert train.epochs is not None
    loader.stop_at = max(1, round(train.epochs * loader.length))
    return loader.steps_for(loader.stop_at)


def _record(session: Session, data: dict[str, Any]) -> dict[str, Any]:
    ctx = session.context
    return {
        "format": FORMAT, "status": "new", "command": command_line(), "run": ctx.run.model_dump(mode="json"),
        "parts": resolve.describe(session.resolved), "model": {"name": ctx.bundle.name, "source": ctx.bundle.source,
        "fingerprint": ctx.bundle.fingerprint}, "data": data, "steps": ctx.clock.steps, "environment": environment(),
        "world": ctx.engine.world,
    }  # fmt: skip


def _seconds_before(folder: Path) -> float:
    """Seconds of a run's earlier starts."""
    try:
        return float(json.loads((folder / "run.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _clear(folder: Path) -> None:
    import shutil

    for name in ("checkpoints", "adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "run.json"):
        (folder / name).unlink(missing_ok=True)
