"""Nash-RS: the step of Nash mirror descent by rejection sampling (arXiv:2503.10990)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from metier.core.config import PartRef
from metier.core.data.examples import Completion, Prompted
from metier.core.part import Count, Fraction, Positive, part
from metier.core.policy import Policy
from metier.parts.source._duels import Judge, drawn, usable
from metier.parts.source._pairs import reward_of
from metier.parts.source._rounds import everything, in_turn


@part(
    "source/nash-rs", paper="arXiv:2503.10990 (Nash-RS); the acceptance rule is ours", rows=(133,), needs=("policy", "reference")
)
class NashRs:
    """Each round: answers of the mixture of model and reference, taken with probability ``exp(η (p - 1))``, for ``lm``.

    ``p`` is an answer's mean win rate against ``opponents`` answers of the same mixture. What is taken is distributed as
    ``π^μ exp(η p)``, the mirror step of Nash-MD towards which the fine-tuning moves the model: no likelihood ratios, no reference
    in the loss. ``kappa = η τ`` is the reference's share in the logits, so ``τ = kappa / eta``; the reference is what holds the
    policy, and with ``kappa = 0`` nothing does. The estimate of p from few opponents is noisy, which acts like a smaller η.

    The paper's exact rule is not known to us; this is the derivation above. ``number`` answers a prompt are drawn, of which
    about ``exp(-η/2)`` are taken. The judge is that of ``source/nash-md``. ``prompts`` limits a round to so many, in turn.
    Answers that did not end before ``max_new_tokens`` are left out. Reads prompts, makes prompts with completions.
    """

    tags = ("learning/objective/self-play", "learning/paradigm/online")
    takes = (Prompted,)
    example: ClassVar = {"judge": "length"}

    def __init__(
        self, *, judge: PartRef, pairwise: bool = False, scale: Positive = 1.0, kappa: Fraction = 0.125, eta: Positive = 1.0,
        number: Count = 4, opponents: Count = 4, prompts: Count | None = None, max_new_tokens: Count = 64,
    ) -> None:  # fmt: skip
        self.judge = Judge(reward_of(judge, "source/nash-rs", "judge"), pairwise, scale)
        self.kappa, self.eta, self.number, self.opponents = kappa, eta, number, opponents
        self.prompts, self.max_new_tokens = prompts, max_new_tokens

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Completion]:
        """What is taken in one round, in random order."""
        turn = in_turn(everything(inputs), self.prompts, round)
        own, others = (drawn(policy, turn, n, self.kappa, rng, self.max_new_tokens) for n in (self.number, self.opponents))
        wins = self.judge.wins(turn, own := [usable(row) for row in own], others)
        made = [
            Completion(e.prompt, a.text, id=f"{e.id}#{k}" if e.id else "", meta={**e.meta, "win_rate": float(p)})
            for e, row, table in zip(turn, own, wins, strict=True)
            for k, (a, p) in enumerate(zip(row, table.mean(1), strict=True))
            if rng.random() < acceptance(float(p), self.eta)
        ]
        return [made[i] for i in rng.permutation(len(made))]


def acceptance(p: float, eta: float) -> float:
    """``exp(η (p - 1))``: probability with which an answer of win rate ``p`` is taken, at most 1."""
    return float(np.exp(eta * (p - 1)))
