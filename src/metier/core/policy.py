"""The model being trained, as a source may use it: to answer prompts, to score answers, to be compared with the reference."""

from collections.abc import Sequence
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
from metier.core.errors import UsageError
from metier.core.models import Bundle
from metier.core.sample import Answer, Mixture, sample
from metier.core.scores import FrozenScorer, Reference, answer_rewards, evaluating, token_logps
from metier.core.separate import why_apart

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
        return replace(self, bundle=bundle, encoder=encoder, shape=shape, initial=None)

    def sample(
        self, prompts: Sequence[Prompt], number: int, *, max_new_tokens: int, seed: int, temperature: float = 1.0,
        top_p: float = 1.0, continued: Sequence[np.ndarray] | None = None, mixed: float = 0.0,
    ) -> list[list[Answer]]:  # fmt: skip
        """``number`` answers to each prompt, rendered by the chat template where there is one; no answer is empty.

        ``continued`` are the token ids that the answer to each prompt begins with: the answers are then what follows them.
        ``mixed`` is the share of the logits of the model at the start, with ``needs=("policy", "reference")``.
        """
        ids = [self.encoder.prompt(p) for p in prompts]
        if continued is not None:
            ids = [np.concatenate([p, begun]).astype(np.int32) for p, begun in zip(ids, continued, strict=True)]
        with self.engine.autocast():
            return sample(
                self.bundle.model, self.bundle.tokenizer, ids, number=number, max_new_tokens=max_new_tokens, seed=seed,
                allow_empty=False, temperature=temperature, top_p=top_p, mixture=self._mixture(mixed) if mixed else None,
            )  # fmt: skip

    def _mixture(self, share: float) -> Mixture:
        initial = self.initial
        assert isinstance(initial, FrozenScorer), "the source declares needs=('policy', 'reference')"
        return Mixture(initial.model, share, initial.disabled)

    def logps(self, prompts: Sequence[Prompt], answers: Answers) -> list[np.ndarray]:
        """Log-probability of each answer, its end token included: for each prompt ``[K]`` float64."""
        return self._summed(prompts, answers, lambda layout: token_logps(self.bundle.model, layout))

    def initial_logps(self, prompts: Sequence[Prompt], answers: Answers) -> list[np.ndarray]:
        """The same under the model at the start."""
        initial = self.initial
        assert initial is not None, "the source declares needs=('policy', 'reference')"
        return self._summed(prompts, answers, lambda layout: initial(layout, False))

    def rewards(self, prompts: Sequence[Prompt], answers: Answers) -> list[np.ndarray]:
        """What the reward model being trained says of each answer. Raises ``UsageError`` when another kind is trained."""
        if self.reads is not Rewards:
            raise UsageError("the model being trained is no reward model", hint="Use objective: bradley-terry.")
        found = self._scored(self._items(prompts, answers), lambda layout: answer_rewards(self.bundle.model, layout))
        return [np.asarray(v, np.float64) for v in found]

    def _summed(self, prompts: Sequence[Prompt], answers: Answers, score: Any) -> list[np.ndarray]:
        items = self._items(prompts, answers)

        def per_answer(layout: Any) -> torch.Tensor:
            values = score(layout).double()
            return values.new_zeros(sum(layout.answers)).index_add(0, layout.sequence, values)

        return self._scored(items, per_answer)

    def _items(self, prompts: Sequence[Prompt], answers: Answers) -> list[Item]:
        """One item a prompt. Raises ``UsageError`` for one that is too long for ``data.max_length``."""
        found = []
        for i, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
            item = self.encoder(Ranked(prompt, tuple(own), (0.0,) * len(own), id=f"prompt {i}"))
            if item is None:
                raise UsageError(f"prompt {i} with its answers is longer than data.max_length = {self.encoder.max_length}")
            found.append(item)
        return found

    @torch.no_grad()
    def _scored(self, items: Sequence[Item], score: Any) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.zeros(0)] * len(items)
        micros = self.shape.micros(items)
        for rows, layout in zip(micros, self.shape.layouts(items, micros), strict=True):
            order = [i for row in rows for i in row]
            with evaluating(self.bundle.model), self.engine.autocast(), aux.collect(layout):
                values = score(layout.to(self.engine.device)).double().cpu()
            for i, own in zip(order, values.split([len(items[i].answers) for i in order]), strict=True):
                found[i] = own.numpy()
        return found
