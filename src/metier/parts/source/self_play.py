"""SPIN: the data's answer against the model's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metier.core.data.examples import Completion, Preference
from metier.core.part import Count, NonNegative, part
from metier.core.policy import Policy
from metier.parts.source._rounds import drawn, everything, in_turn


@part("source/self-play", paper="arXiv:2401.01335 (SPIN), algorithm 1", rows=(134,), needs=("policy",))
class SelfPlay:
    """Each round: chosen is the answer of the data, rejected an answer of the current model. No preferences are needed.

    With ``hook/tr-dpo: {share: 1, every: round}`` the reference is the model that wrote the round's answers, as in the paper
    (its opponent), and with ``objective: dpo`` the loss is the paper's logistic one. The fixed point is the data's own
    distribution: what the model writes can then not be told from it. ``prompts`` limits a round to so many prompts, in turn;
    without, each round goes over all of them, as in the paper. In the paper's later rounds half of the pairs are those of
    the round before; here every round's answers are new.

    An answer equal to the data's, one of blanks, and, with ``finished``, one that did not end before ``max_new_tokens`` is
    left out. Reads prompts with completions.
    """

    tags = ("learning/objective/self-play", "learning/paradigm/online")
    takes = (Completion,)

    def __init__(
        self, *, prompts: Count | None = None, max_new_tokens: Count = 128, temperature: NonNegative = 1.0, finished: bool = True
    ) -> None:
        self.prompts, self.max_new_tokens, self.temperature, self.finished = prompts, max_new_tokens, temperature, finished

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Preference]:
        """The pairs of one round, in random order."""
        turn = in_turn(everything(inputs), self.prompts, round)
        answers = drawn(
            policy, turn, 1, rng, max_new_tokens=self.max_new_tokens, temperature=self.temperature, finished=self.finished
        )
        made = [
            Preference(e.prompt, e.completion, own[0], meta=e.meta)
            for e, own in zip(turn, answers, strict=True) if own and own[0].strip() != e.completion.strip()
        ]  # fmt: skip
        return [made[i] for i in rng.permutation(len(made))]
