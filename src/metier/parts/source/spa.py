"""SPA: from a few labelled pairs, the model labels its own answers by its implicit reward."""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from metier.core.data.examples import Preference, Prompt, Prompted, Ranked
from metier.core.errors import UsageError
from metier.core.part import Count, NonNegative, part
from metier.core.policy import Policy
from metier.parts.source._rounds import drawn, everything, once

TIE = 1e-4
"""Differences of implicit rewards, in nats, that are rounding."""
CUTS = ("right", "left-prompt")
"""Values of ``data.truncate`` with which nothing is too long."""


def judged(ratios: Sequence[float] | np.ndarray) -> tuple[int, int, float] | None:
    """``(best, worst, gap)`` of answers by their log-ratios ``log π/μ₀`` in nats; ``None`` when they tie."""
    best, worst = int(np.argmax(ratios)), int(np.argmin(ratios))
    gap = float(ratios[best] - ratios[worst])
    return (best, worst, gap) if gap > TIE else None


def fitting(encoder: Any, prompt: Prompt, texts: Sequence[str]) -> list[str]:
    """The different answers that ``data.max_length`` has room for behind the prompt, or where ``data.truncate`` cuts, all.

    None when what cutting leaves of them cannot be told apart.
    """
    encoder = copy.copy(encoder)
    encoder.on_empty, encoder.truncate = "drop", encoder.truncate if encoder.truncate in CUTS else "drop"

    def fits(*own: str) -> bool:
        return encoder(Ranked(prompt, own, (0.0,) * len(own))) is not None

    found = [t for t in dict.fromkeys(texts) if fits(t)]
    return found if len(found) < 2 or fits(*found) else []


@part("source/spa", paper="arXiv:2406.04412, section 4.1", rows=(135,), needs=("policy", "reference"))
class Spa:
    """First the labelled pairs, then in each round answers of the model to new prompts, labelled by the model itself.

    Of ``number`` answers to a prompt the one with the largest and the one with the smallest ``log π(y)/μ₀(y)`` become the pair:
    π is the model at the beginning of the round, μ₀ the model at the start of the run (or ``reference``), not the reference of
    training, which follows with ``hook/tr-dpo: {share: 1, every: round}``. Pairs that tie are left out. The difference
    stands in the row as ``log_ratio_gap``; ``P(y₁ > y₂) = σ(β gap)``. What is longer with its prompt than ``data.max_length``
    is no answer, as if it had not ended before ``max_new_tokens``, unless ``data.truncate`` says where to cut.

    Inputs: pairs (``Preference``) are the labelled seeds; the first round goes over them ``seed_epochs`` times (the paper: 3
    below 2000 seeds). Prompts have one turn each, ``prompts`` a round (all by default): used again they would amplify errors.
    The data end with the last prompt. Without seeds start from a model that was tuned on some, with ``reference`` the one before
    tuning. Watch the lengths: summed log-ratios may prefer long or short answers. Use with ``objective: spa``.

    Raises ``UsageError`` when every pair of a round ties, as they do when model and μ₀ are the same.
    """

    tags = ("data/quality/noise", "learning/paradigm/online")
    takes = (Prompted, Preference)

    def __init__(
        self, *, number: Annotated[int, Ge(2)] = 2, prompts: Count | None = None, seed_epochs: Count = 3,
        max_new_tokens: Count = 300, temperature: NonNegative = 0.7, finished: bool = True,
    ) -> None:  # fmt: skip
        self.number, self.prompts, self.seed_epochs = number, prompts, seed_epochs
        self.max_new_tokens, self.temperature, self.finished = max_new_tokens, temperature, finished

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Preference] | None:
        """The seeds in the first round, where there are any; then the pairs of the next prompts, ``None`` after the last."""
        found = everything(inputs)
        seeds = [e for e in found if isinstance(e, Preference)]
        if seeds and round == 0:
            return [seeds[i] for _ in range(self.seed_epochs) for i in rng.permutation(len(seeds))]
        turn = once([e for e in found if isinstance(e, Prompted)], self.prompts, round - bool(seeds))
        return self._labelled(turn, policy, rng) if turn else None

    def _longest(self, turn: list[Prompted], encoder: Any) -> int:
        """Tokens that are sampled: no more than the shortest prompt leaves room for, where what is longer is of no use."""
        room = encoder.max_length - min(len(encoder.prompt(e.prompt)) for e in turn)
        return self.max_new_tokens if encoder.truncate in CUTS else max(1, min(self.max_new_tokens, room))

    def _labelled(self, turn: list[Prompted], policy: Policy, rng: np.random.Generator) -> list[Preference]:
        answers = drawn(
            policy, turn, self.number, rng, max_new_tokens=self._longest(turn, policy.encoder), temperature=self.temperature,
            finished=self.finished,
        )  # fmt: skip
        distinct = [fitting(policy.encoder, e.prompt, own) for e, own in zip(turn, answers, strict=True)]
        asked = [(e.prompt, e.meta, own) for e, own in zip(turn, distinct, strict=True) if len(own) > 1]
        prompts, texts = [p for p, _, _ in asked], [own for _, _, own in asked]
        ratios = [a - b for a, b in zip(policy.logps(prompts, texts), policy.initial_logps(prompts, texts), strict=True)]
        made = [
            Preference(prompt, own[best], own[worst], meta={**meta, "log_ratio_gap": gap})
            for (prompt, meta, own), r in zip(asked, ratios, strict=True) if (pair := judged(r)) for best, worst, gap in [pair]
        ]  # fmt: skip
        if not made:
            why = "all pairs tie" if asked else "no prompt has two different usable answers"
            raise UsageError(
                f"the model labels none of its answers: {why}", where="source/spa",
                hint="Give labelled pairs as an input, or start from a tuned model with reference: the one before tuning."
                if asked else "Raise max_new_tokens, data.max_length, temperature or number.",
            )  # fmt: skip
        return [made[i] for i in rng.permutation(len(made))]
