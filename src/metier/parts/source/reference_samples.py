"""Answers of the reference beside given pairs, for objectives that estimate a divergence on them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from metier.core.data import rounds
from metier.core.data.examples import Preference
from metier.core.errors import UsageError
from metier.core.part import Count, part
from metier.core.policy import Policy
from metier.parts.source._rounds import drawn, everything


@part(
    "source/reference-samples",
    paper="the samples y ~ π_ref of arXiv:2407.09072 (TYPO) and arXiv:2405.21046 (XPO)",
    rows=(86,),
    needs=("policy",),
)
class ReferenceSamples:
    """Adds ``samples`` to pairs: ``number`` answers of the reference to each prompt, at temperature 1 without truncation.

    They are drawn once, in the first round, when the model still is the reference (with ``reference`` in the run file it is
    that model that answers); later rounds use the same ones in another order, as the expectation over a fixed reference allows.

    An estimate on samples is of the distribution they come from: an answer that does not end within ``max_new_tokens``, or has
    only blanks, is drawn again up to ``tries`` times, so the expectation is over answers that end by then; choose
    ``max_new_tokens`` so that nearly all do. A pair that is still short of samples is left out. Samples may read like
    the pair's own answers.

    Reads pairs. Raises ``UsageError`` when hardly any answer ends.
    """

    takes = (Preference,)

    def __init__(self, *, number: Count = 1, max_new_tokens: Count = 128, tries: Count = 4) -> None:
        self.number, self.max_new_tokens, self.tries = number, max_new_tokens, tries

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Preference]:
        """All pairs with their samples, in an order of the round's own."""
        found = rounds.made(policy.folder, 0) if round else self._sampled(everything(inputs), policy, rng)
        return [found[i] for i in rng.permutation(len(found))]

    def _sampled(self, pairs: list[Preference], policy: Policy, rng: np.random.Generator) -> list[Preference]:
        reference = policy if policy.reference is None else policy.other(policy.reference)
        samples: list[list[str]] = [[] for _ in pairs]
        for _ in range(self.tries):
            short = [i for i, own in enumerate(samples) if len(own) < self.number]
            if not short:
                break
            answers = drawn(reference, [pairs[i] for i in short], self.number, rng, max_new_tokens=self.max_new_tokens)
            for i, own in zip(short, answers, strict=True):
                samples[i] = (samples[i] + own)[: self.number]
        made = [replace(e, samples=tuple(own)) for e, own in zip(pairs, samples, strict=True) if len(own) == self.number]
        if 2 * len(made) < len(pairs):
            raise UsageError(
                f"only {len(made)} of {len(pairs)} prompts have {self.number} answers of the reference that end within "
                f"{self.max_new_tokens} tokens",
                where="source/reference-samples", hint="Raise max_new_tokens.",
            )  # fmt: skip
        return made
