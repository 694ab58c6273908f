"""Answers of the policy against answers of its mixture with the reference: who wins how often."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metier.core.data.examples import Prompt
from metier.core.policy import Policy
from metier.core.sample import Answer
from metier.parts.source._pairs import judged, known_answers
from metier.parts.source._rounds import seed

Array = np.ndarray


@dataclass(frozen=True)
class Judge:
    """A reward part as the judge of two answers."""

    reward: Any
    pairwise: bool
    """Its first score of a list of two is the probability that the first is better; else ``σ(scale (r - r'))``."""
    scale: float = 1.0

    def wins(self, examples: Sequence[Any], own: Sequence[Sequence[Answer]], others: Sequence[Sequence[Answer]]) -> list[Array]:
        """For each prompt ``[K, J]``: probability that its k-th answer is preferred to the j-th opponent.

        A pairwise judge is asked in both orders and averaged. One half for answers that read the same; an answer that did not
        end before the limit loses against one that did.
        """
        prompts = [e.prompt for e in examples]
        texts, rivals = ([[a.text for a in row] for row in rows] for rows in (own, others))
        known = known_answers(examples)
        found = (self._asked if self.pairwise else self._scored)(prompts, texts, rivals, known)
        for p, mine, theirs in zip(found, own, others, strict=True):
            p[np.array([[a.text == b.text for b in theirs] for a in mine], bool).reshape(p.shape)] = 0.5
            ended = np.array([a.ended for a in mine], bool)[:, None], np.array([b.ended for b in theirs], bool)[None]
            p[ended[0] & ~ended[1]], p[~ended[0] & ended[1]] = 1.0, 0.0
        return found

    def _scored(
        self, prompts: list[Prompt], texts: list[list[str]], rivals: list[list[str]], known: list[str] | None
    ) -> list[Array]:
        both = judged(self.reward, prompts, [a + b for a, b in zip(texts, rivals, strict=True)], known)
        out = []
        for r, mine in zip(both, texts, strict=True):
            gap = self.scale * (r[: len(mine), None] - r[None, len(mine) :])
            out.append(1 / (1 + np.exp(-np.clip(gap, -700, 700))))
        return out

    def _asked(
        self, prompts: list[Prompt], texts: list[list[str]], rivals: list[list[str]], known: list[str] | None
    ) -> list[Array]:
        each = [(i, a, b) for i, own in enumerate(texts) for a in dict.fromkeys(own) for b in dict.fromkeys(rivals[i]) if a != b]
        asked, truth = [prompts[i] for i, _, _ in each], None if known is None else [known[i] for i, _, _ in each]
        straight = judged(self.reward, asked, [[a, b] for _, a, b in each], truth) if each else []
        turned = judged(self.reward, asked, [[b, a] for _, a, b in each], truth) if each else []
        found = {duel: (x[0] + 1 - y[0]) / 2 for duel, x, y in zip(each, straight, turned, strict=True)}
        return [
            np.array([[found.get((i, a, b), 0.5) for b in rivals[i]] for a in own]).reshape(len(own), len(rivals[i]))
            for i, own in enumerate(texts)
        ]


def drawn(
    policy: Policy, examples: Sequence[Any], number: int, mixed: float, rng: np.random.Generator, max_new_tokens: int
) -> list[list[Answer]]:
    """Answers at temperature 1, of the policy with a share ``mixed`` of the reference's logits."""
    return policy.sample([e.prompt for e in examples], number, max_new_tokens=max_new_tokens, seed=seed(rng), mixed=mixed)


def usable(answers: Sequence[Answer]) -> list[Answer]:
    """Those that ended and say something: others, trained on, would teach to stop in the middle."""
    return [a for a in answers if a.ended and a.text.strip()]
