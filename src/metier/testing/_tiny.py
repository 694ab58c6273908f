"""A run in miniature for the contract suites: a very small model, a few layouts, a context, training
steps."""

import contextlib
import copy
import inspect
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metier.core import models
from metier.core.batch import Tokens
from metier.core.clock import Clock
from metier.core.config import Data, Run, Train
from metier.core.context import Context, derive_seed
from metier.core.engine import Engine
from metier.core.events import Dispatcher
from metier.core.layout import Layout
from metier.core.lossmodule import LossModule
from metier.core.part import Built, Card
from metier.core.reference import ReferenceModel
from metier.core.scores import reference_scorer

MODEL = "lab/llama-50k"


def nll(b: Tokens) -> Tensor:
    """Negative log-likelihood of every target."""
    return -b.logps


def layout(rows: list[list[int]], label: list[int] | None = None) -> Layout:
    """Right-padded plain sequences, each token a target of the one before it."""
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    real = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    where = [(i, j) for i, r in enumerate(rows) for j in range(len(r) - 1)]
    row, col = (torch.tensor(v) for v in zip(*where, strict=True))
    return Layout(
        input_ids=ids, position_ids=torch.arange(width).expand(len(rows), -1) * real, group=real,
        branch=torch.zeros_like(ids), row=row, col=col, target=ids[row, col + 1], sequence=row,
        ids=tuple(f"rows:{i}" for i in range(len(rows))),
        label=None if label is None else torch.tensor(label),
        answers=(1,) * len(rows),
    )  # fmt: skip


def layouts(count: int, *, vocabulary: int = 64, seed: int = 0, examples: int = 3) -> list[Layout]:
    """Layouts of random tokens in rows of 4 to 9."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        sizes = torch.randint(4, 10, (examples,), generator=g).tolist()
        made.append(layout([torch.randint(1, vocabulary, (n,), generator=g).tolist() for n in sizes]))
    return made


@dataclass
class Tiny:
    """A context with the parts that listen to its events, and steps as the loop makes them."""

    context: Context
    listeners: list[Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dispatch = Dispatcher(self.listeners)
        self.context.evaluate = self.evaluate
        self.context.emit = self.events.append
        self.held_out = layouts(2, seed=99)

    def step(self) -> None:
        """One optimizer step on layouts that depend on the step only."""
        ctx = self.context
        torch.manual_seed(derive_seed(ctx.run.train.seed, "step", ctx.clock.step))
        ctx.model.train()
        ctx.layouts = layouts(2, seed=ctx.clock.step)
        self.dispatch("on_batch", ctx, ctx.layouts)
        results = [ctx.module(batch) for batch in ctx.layouts]
        units = sum(n for _, n, _ in results)
        loss = torch.stack([total for total, _, _ in results]).sum() / units
        loss.backward()
        self.dispatch("on_gradients", ctx)
        ctx.optimizer.step()
        ctx.optimizer.zero_grad(set_to_none=True)
        tokens = ctx.clock.tokens + sum(batch.real_tokens for batch in ctx.layouts)
        ctx.clock = replace(ctx.clock, step=ctx.clock.step + 1, tokens=tokens)
        ctx.metrics = {"loss": float(loss.detach()), "lr": 0.1, "units": units}
        self.dispatch("on_step", ctx)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss on held-out layouts, with the evaluation events around it."""
        ctx = self.context
        self.dispatch("on_eval_start", ctx)
        training = ctx.model.training
        ctx.model.eval()
        total = [ctx.module(batch)[:2] for batch in self.held_out]
        ctx.model.train(training)
        self.dispatch("on_eval_end", ctx)
        return {"eval_loss": float(sum(t for t, _ in total)) / sum(n for _, n in total)}


def tiny(*listeners: Any, model: Any = None, steps: int = 8) -> Tiny:
    """A run in miniature with ``listeners``; the same weights every time."""
    bundle = models.load(MODEL, seed=0)
    if model is not None:
        bundle = models.replace_model(bundle, model)
    objective = Built("objective/nll", Card("objective/nll", "none"), partial(nll), {})
    module = LossModule(bundle.model, objective)
    run = Run(model=MODEL, data=Data(train="none"), train=Train(steps=steps))
    engine = Engine(torch.device("cpu"), "fp32", "ddp")
    optimizer = torch.optim.SGD(bundle.model.parameters(), lr=0.1)
    folder = Path(tempfile.gettempdir())
    reference = ReferenceModel(reference_scorer(copy.deepcopy(bundle.model), contextlib.nullcontext), MODEL, bundle.fingerprint)
    clock = Clock(0, steps, 0, 40.0)
    context = Context(run, bundle, engine, optimizer, module, folder, clock, lambda e: None, dict, reference=reference)
    return Tiny(context, list(listeners))


def cached(model: Any, ids: Tensor, cache: Any = None) -> Any:
    """Output of a forward pass that continues ``cache``, under the name that this transformers gives the
    argument."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(input_ids=ids, use_cache=True, **({} if cache is None else {name: cache}))


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
