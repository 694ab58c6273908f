"""The model being trained, as a source may use it: to answer prompts, to score answers, to be compared with the reference.

With several processes the first one runs the source. What it asks of the policy is dealt to all of them: prompts to be
answered by their number, on which the random numbers depend, and scoring by micro-batches that are the same for any number of
processes. So a round is the same, and a judge need not be one that says the same in every process.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metier.core import aux, models
from metier.core.batch import Rewards
from metier.core.data.encode import Encoder, Item
from metier.core.data.examples import Prompt, Ranked
from metier.core.data.loader import Shape
from metier.core.engine import Engine
from metier.core.errors import MetierError, UsageError
from metier.core.layout import Layout
from metier.core.models import Bundle
from metier.core.sample import Answer, Mixture, sample
from metier.core.scores import FrozenScorer, Reference, answer_rewards, evaluating, token_logps
from metier.core.separate import why_apart

SCORED = 8192
"""Tokens of a micro-batch that is scored, at most: small enough that there is something to share."""
Answers = Sequence[Sequence[str]]
"""For each prompt, its answers."""


@dataclass(frozen=True)
class Policy:
    """What sources with ``needs=("policy",)`` are given. Everything is computed without gradient, dropout off."""

    bundle: Bundle
    engine: Engine
    encoder: Encoder
    shape: Shape
    folder: Path
    """The run's folder."""
    reads: type
    """Batch type of the objective."""
    initial: Reference | None = None
    """Scores under the model at the start of the run (or ``reference``), with ``needs=("policy", "reference")``."""
    reference: str | None = None
    """Name of the reference model when it is not the model at the start."""
    place: str | None = None
    """Where another model than the run's comes from."""

    def other(self, where: str) -> "Policy":
        """The same for another model, with its own tokenizer: the folder of a finished run, a model's folder, or its name.

        It has no ``initial``. Raises ``UsageError`` when there is no such model.
        """
        from metier.core.trained import open_run

        device = self.engine.device
        if (Path(where) / "run.json").is_file():
            bundle = open_run(where, device=device).bundle
        else:
            bundle = models.load(where, dtype=next(self.bundle.model.parameters()).dtype)
            bundle.model.to(device).eval()
        e, pad = self.encoder, bundle.tokenizer.pad_token_id
        encoder = Encoder(bundle.tokenizer, max_length=e.max_length, truncate=e.truncate, on_empty=e.on_empty, labels=e.labels)
        shape = replace(self.shape, pad_id=0 if pad is None else pad, separate=bool(why_apart(bundle.model)))
        return replace(self, bundle=bundle, encoder=encoder, shape=shape, initial=None, place=where)

    def sample(
        self, prompts: Sequence[Prompt], number: int, *, max_new_tokens: int, seed: int, temperature: float = 1.0,
        top_p: float = 1.0, continued: Sequence[np.ndarray] | None = None, mixed: float = 0.0,
    ) -> list[list[Answer]]:  # fmt: skip
        """``number`` answers to each prompt, rendered by the chat template where there is one; no answer is empty.

        A row of data holds no empty answer, so the end token is barred from the first place: answers are of the model
        renormalised on the others, and a gradient that is right only on the model's own answers must allow for it.
        ``continued`` are the token ids that the answer to each prompt begins with: the answers are then what follows them,
        which may be nothing if something was begun.
        ``mixed`` is the share of the logits of the model at the start, with ``needs=("policy", "reference")``.
        """
        ids = [self.encoder.prompt(p) for p in prompts]
        if continued is not None:
            ids = [np.concatenate([p, begun]).astype(np.int32) for p, begun in zip(ids, continued, strict=True)]
        costs = [float(len(p) + max_new_tokens) for p in ids]
        allow_empty = continued is not None and all(map(len, continued))
        return self._together("_sampled", costs, ids, number, max_new_tokens, seed, temperature, top_p, mixed, allow_empty)

    def _sampled(
        self, share: list[int], ids: Sequence[np.ndarray], number: int, max_new_tokens: int, seed: int, temperature: float,
        top_p: float, mixed: float, allow_empty: bool,
    ) -> list[list[Answer]]:  # fmt: skip
        """The answers to a share of the prompts."""
        with self.engine.autocast():
            return sample(
                self.bundle.model, self.bundle.tokenizer, [ids[i] for i in share], number=number, max_new_tokens=max_new_tokens,
                seed=seed, allow_empty=allow_empty, temperature=temperature, top_p=top_p,
                mixture=self._mixture(mixed) if mixed else None, numbers=share,
            )  # fmt: skip

    def _mixture(self, share: float) -> Mixture:
        initial = self.initial
        assert isinstance(initial, FrozenScorer), "the source declares needs=('policy', 'reference')"
        return Mixture(initial.model, share, initial.disabled)

    def logps(self, prompts: Sequence[Prompt], answers: Answers) -> list[np.ndarray]:
        """Log-probability of each answer, its end token included: for each prompt ``[K]`` float64."""
        return self._scored("policy", self._items(prompts, answers))

    def initial_logps(self, prompts: Sequence[Prompt], answers: Answers) -> list[np.ndarray]:
        """The same under the model at the start."""
        assert self.initial is not None, "the source declares needs=('policy', 'reference')"
        return self._scored("initial", self._items(prompts, answers))

    def rewards(self, prompts: Sequence[Prompt], answers: Answers) -> list[np.ndarray]:
        """What the reward model being trained says of each answer. Raises ``UsageError`` when another kind is trained."""
        if self.reads is not Rewards:
            raise UsageError("the model being trained is no reward model", hint="Use objective: bradley-terry.")
        return self._scored("rewards", self._items(prompts, answers))

    def _items(self, prompts: Sequence[Prompt], answers: Answers) -> list[Item]:
        """One item a prompt. Raises ``UsageError`` for one that is too long for ``data.max_length``."""
        found = []
        for i, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
            item = self.encoder(Ranked(prompt, tuple(own), (0.0,) * len(own), id=f"prompt {i}"))
            if item is None:
                raise UsageError(f"prompt {i} with its answers is longer than data.max_length = {self.encoder.max_length}")
            found.append(item)
        return found

    def _scored(self, kind: str, items: Sequence[Item]) -> list[np.ndarray]:
        """``[K]`` float64 for each item."""
        micros = replace(self.shape, budget=min(self.shape.budget, SCORED)).micros(items)
        order = [[i for row in rows for i in row] for rows in micros]
        costs = [float(sum(items[i].length for i in own)) for own in order]
        values = self._together("_values", costs, kind, items, micros)
        found = {i: v for own, batch in zip(order, values, strict=True) for i, v in zip(own, batch, strict=True)}
        return [found[i] for i in range(len(items))]

    @torch.no_grad()
    def _values(
        self, share: list[int], kind: str, items: Sequence[Item], micros: list[list[list[int]]]
    ) -> list[list[np.ndarray]]:
        """Scores of the items of a share of the micro-batches."""
        mine, found = [micros[k] for k in share], []
        for rows, layout in zip(mine, self.shape.layouts(items, mine), strict=True):
            with evaluating(self.bundle.model), self.engine.autocast(), aux.collect(layout):
                values = self._of_answers(kind, layout.to(self.engine.device)).double().cpu()
            found.append([v.numpy() for v in values.split([len(items[i].answers) for row in rows for i in row])])
        return found

    def _of_answers(self, kind: str, layout: Layout) -> torch.Tensor:
        """``[S]``: one number for each answer of a layout."""
        if kind == "rewards":
            return answer_rewards(self.bundle.model, layout)
        if kind == "initial":
            assert self.initial is not None
            values = self.initial(layout, False).double()
        else:
            values = token_logps(self.bundle.model, layout).double()
        return values.new_zeros(sum(layout.answers)).index_add(0, layout.sequence, values)

    # --- several processes -----------------------------------------------------------------------------------------

    def together(self, work: Callable[[], None]) -> None:
        """``work`` in the first process, with the others sharing what it asks of this policy. Collective.

        Raises what ``work`` raises, and ``MetierError`` in the other processes.
        """
        engine = self.engine
        if engine.world == 1:
            work()
        elif engine.main:
            try:
                work()
            except Exception as e:
                engine.from_main(f"{type(e).__name__}: {e}")
                raise
            engine.from_main(None)
        elif problem := self._help():
            raise MetierError(f"the first process failed: {problem}")

    def _together(self, method: str, costs: list[float], *args: Any) -> list[Any]:
        """What ``method`` gives for all of its items, each process having done a share."""
        self.engine.from_main((self.place, method, costs, args))
        return self.engine.shared(costs, lambda share: getattr(self, method)(share, *args))

    def _help(self) -> str | None:
        """Do a share of everything that the first process asks; what went wrong there at the end, if anything."""
        model = self

        def work(share: list[int]) -> list[Any]:
            nonlocal model
            if place != model.place:
                model = self if place is None else self.other(place)
            return getattr(model, method)(share, *args)

        while isinstance(asked := self.engine.from_main(), tuple):
            place, method, costs, args = asked
            with contextlib.suppress(Exception):  # the first process has it too, and says when it gives up
                self.engine.shared(costs, work)
        return asked
