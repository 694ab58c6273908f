"""Online preference pairs: the model answers, a reward judges (arXiv:2402.04792)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge

from metier.core.config import PartRef
from metier.core.data.examples import Preference, Prompted
from metier.core.part import Count, NonNegative, part
from metier.core.policy import Policy
from metier.parts.source._pairs import choose, judged, known_answers, reward_of
from metier.parts.source._rounds import drawn, everything, in_turn


@part("source/online-dpo", paper="arXiv:2402.04792 (OAIF), section 3", rows=(134,), needs=("policy",))
class OnlineDpo:
    """Each round: K answers of the current model to each prompt; the best and the worst by ``reward`` become a pair.

    ``prompts`` limits a round to so many prompts, in turn, so that the weights that answer are at most one round old. Pairs
    whose rewards are equal, or whose answers read the same, are left out; ``finished`` leaves out answers that did not end
    before ``max_new_tokens`` (trained on, they would teach to stop in the middle). The margin is the difference of rewards. Right
    answers that rows bring in ``answer`` reach the reward; an answer that it does not rate (NaN) is in no pair.

    Reads prompts. Use with any objective that reads pairs, such as ``dpo``; with ``reference`` left alone this is online DPO.
    """

    tags = ("learning/paradigm/online",)
    takes = (Prompted,)
    example: ClassVar = {"reward": "arithmetic"}

    def __init__(
        self, *, reward: PartRef, number: Annotated[int, Ge(2)] = 2, prompts: Count | None = None, max_new_tokens: Count = 64,
        temperature: NonNegative = 1.0, finished: bool = True,
    ) -> None:  # fmt: skip
        self.reward = reward_of(reward, "source/online-dpo", "reward")
        self.number, self.prompts, self.max_new_tokens = number, prompts, max_new_tokens
        self.temperature, self.finished = temperature, finished

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Preference]:
        """The pairs of one round."""
        turn = in_turn(everything(inputs), self.prompts, round)
        usable = drawn(
            policy,
            turn,
            self.number,
            rng,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            finished=self.finished,
        )
        asked = [(e, texts) for e, texts in zip(turn, usable, strict=True) if len(set(texts)) > 1]
        if not asked:
            return []
        examples, texts = [e for e, _ in asked], [own for _, own in asked]
        scores = judged(self.reward, [e.prompt for e in examples], texts, known_answers(examples))
        return [
            Preference(e.prompt, own[i], own[j], float(s[i] - s[j]), meta=e.meta)
            for e, own, s in zip(examples, texts, scores, strict=True)
            for i, j in choose("top-bottom", s, rng, texts=own)
        ]
