"""Held-out prompts answered during training: reward, win rate, distance to the start, length."""

from typing import Any

import numpy as np

from metier.core import part as parts
from metier.core.answers import Asked, Judge, as_judge, ask, at_start, judged, pair_accuracy, report
from metier.core.config import PartRef
from metier.core.context import Context
from metier.core.data import formats
from metier.core.data.encode import Encoder, Item
from metier.core.data.rows import open_rows
from metier.core.errors import UsageError
from metier.core.part import Count, NonNegative, part


@part("hook/answers", paper="win rate against KL: arXiv:2305.18290, section 6; Rao-Blackwellised KL: arXiv:2504.10637")
class Answers:
    """Every ``every`` steps (and at the last one) the model answers held-out prompts; figures become metrics of that step.

    ``answer_kl`` (nats per answer, full-vocabulary KL at every position), ``answer_kl_mc``, ``answer_length`` (tokens),
    ``answer_ended``; with a ``reward`` part also ``answer_reward`` and ``answer_win_rate`` against the answers of the model at
    the start, drawn with the same random numbers. ``prompts`` is a data set as in ``data.train``, of any format with prompts;
    the first ``limit`` are used. Where it holds pairs, ``answer_pair_accuracy`` says how often ``log π/π_start`` prefers the
    chosen answer (a tie is one half), over ``pairs`` of them: the same measure for every objective. The model at the start
    is the run's ``reference`` (default: its ``model``; with an adapter the model with the adapter off). The time of all this
    counts as training. With several processes each answers a share of the prompts, and the first one judges.
    """

    example = {"prompts": "lab/bradley-terry", "limit": 2, "max_new_tokens": 2, "number": 2}

    def __init__(
        self, *, prompts: str, reward: PartRef | None = None, every: Count | None = None, limit: Count = 64, number: Count = 4,
        pairs: Count = 256, max_new_tokens: Count = 64, temperature: NonNegative = 1.0,
    ) -> None:  # fmt: skip
        self.prompts, self.every, self.limit = prompts, every, limit
        self.number, self.max_new_tokens, self.temperature = number, max_new_tokens, temperature
        self.judge: Judge | None = (
            as_judge(parts.build("reward", reward, where=lambda o: "hook/answers, reward").obj) if reward else None
        )
        self._asked: Asked | None = None
        self._reference: Any = None
        self._others: np.ndarray | None = None
        self.pairs = pairs
        self._items: list[Item] = []

    def on_start(self, ctx: Context) -> None:
        """Read the prompts and answer them as the model at the start. Raises ``UsageError`` for data without prompts."""
        found: Any = formats.examples(open_rows(self.prompts, limit=None))
        if not hasattr(found[0], "prompt"):
            raise UsageError(f"{self.prompts} holds {type(found[0]).__name__.lower()} examples, which have no prompt",
                             where="hook/answers.prompts")  # fmt: skip
        encoder = Encoder(ctx.bundle.tokenizer, max_length=ctx.run.data.max_length, truncate="error", on_empty="error")
        self._asked = ask(
            encoder, found, limit=self.limit, number=self.number, max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, seed=ctx.run.train.seed,
        )  # fmt: skip
        if isinstance(found[0], formats.Preference):
            self._items = encoder.all(found[: self.pairs])
        self._reference, start, switched = at_start(ctx)
        if self.judge is not None:
            with ctx.engine.whole(), switched():
                self._others = judged(start, self._asked, self.judge, ctx.engine)

    def on_step(self, ctx: Context) -> None:
        """Answer the prompts when it is time."""
        step = ctx.clock.step
        if step == ctx.clock.steps or (self.every and step % self.every == 0):
            ctx.metrics |= self.measure(ctx)

    def measure(self, ctx: Context) -> dict[str, float]:
        """The figures now."""
        assert self._asked is not None
        with ctx.engine.whole(), ctx.engine.autocast():
            found = report(
                ctx.bundle, self._asked, reference=self._reference, judge=self.judge, others=self._others, engine=ctx.engine
            )
            if self._items:
                found["pair_accuracy"] = pair_accuracy(ctx.bundle, self._reference, self._items, ctx.engine)
        return {f"answer_{k}": v for k, v in found.items() if isinstance(v, float)}
