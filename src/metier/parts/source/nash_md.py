"""Nash-MD: answers of the policy, scored by how often they win against its mixture with the reference (arXiv:2312.00886)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge

from metier.core.config import PartRef
from metier.core.data.examples import Prompted, Ranked
from metier.core.part import Count, Fraction, Positive, part
from metier.core.policy import Policy
from metier.parts.source._duels import Judge, drawn
from metier.parts.source._pairs import reward_of
from metier.parts.source._rounds import everything, in_turn


@part("source/nash-md", paper="arXiv:2312.00886 (NLHF), section 7", rows=(133, 134), needs=("policy", "reference"))
class NashMd:
    """Each round: ``number`` answers y of the model to each prompt, ``opponents`` y' of the mixture, and ``P(y > y') - 1/2``.

    The mixture's logits are ``(1 - kappa)`` times the model's and ``kappa`` times the reference's, token by token: not the
    geometric mixture of whole answers, an approximation that all implementations share. ``kappa = 0`` is self-play, 1 plays
    against the reference. The scores of a list are the answers' win rates, less one half, against all opponents of the prompt:
    what ``objective: nash-md`` wants, its ``tau`` being the weight of the KL term.

    ``judge`` is a reward part. ``pairwise``: its first score of two answers is the probability that the first is better, as
    that of ``reward/judge`` with ``mode: pairs``; it is asked in both orders. Otherwise ``P = σ(scale (r - r'))``, which has no
    cycles: the game is then that of a reward, seen through a monotone map. ``prompts`` limits a round to so many, in turn;
    keep it small, since the weights that answered must not be old.

    An answer that did not end before ``max_new_tokens`` loses against one that did, and is learnt from without an end token (trl
    lowers its score). No answer of either side is empty: a row of data cannot hold one, so the end token is barred from the
    first place and the game is that among the other answers, which the baseline of ``objective: nash-md`` is made for. Left
    out are answers of blanks, as if they could not occur either, and prompts with fewer than two others. Reads prompts.
    """

    tags = ("learning/objective/self-play", "learning/paradigm/online")
    takes = (Prompted,)
    example: ClassVar = {"judge": "length"}

    def __init__(
        self, *, judge: PartRef, pairwise: bool = False, scale: Positive = 1.0, kappa: Fraction = 0.125,
        number: Annotated[int, Ge(2)] = 2, opponents: Count = 1, prompts: Count | None = None, max_new_tokens: Count = 64,
    ) -> None:  # fmt: skip
        self.judge = Judge(reward_of(judge, "source/nash-md", "judge"), pairwise, scale)
        self.kappa, self.number, self.opponents = kappa, number, opponents
        self.prompts, self.max_new_tokens = prompts, max_new_tokens

    def round(self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator) -> list[Ranked]:
        """The lists of one round."""
        turn = in_turn(everything(inputs), self.prompts, round)
        own = [[a for a in row if a.text.strip()] for row in drawn(policy, turn, self.number, 0.0, rng, self.max_new_tokens)]
        others = drawn(policy, turn, self.opponents, self.kappa, rng, self.max_new_tokens)
        kept = [i for i, row in enumerate(own) if len(row) >= 2]
        turn, own, others = [turn[i] for i in kept], [own[i] for i in kept], [others[i] for i in kept]
        wins = self.judge.wins(turn, own, others)
        return [
            Ranked(
                e.prompt,
                tuple(a.text for a in row),
                tuple((p.mean(1) - 0.5).tolist()),
                tuple(not a.ended for a in row),
                id=e.id,
                meta=e.meta,
            )
            for e, row, p in zip(turn, own, wins, strict=True)
        ]
