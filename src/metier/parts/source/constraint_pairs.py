"""Preference pairs from answers to prompts with constraints that a program verifies (arXiv:2412.15282)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from metier.core import constraints
from metier.core.config import PartRef
from metier.core.data.examples import Preference, Prompted
from metier.core.errors import UsageError
from metier.core.part import Count, Index, NonNegative, part
from metier.core.policy import Policy
from metier.parts.source import _tree as tree
from metier.parts.source._candidates import Candidate, Contrast, take
from metier.parts.source._pairs import judged, known_answers, last, reward_of, with_last
from metier.parts.source._rounds import everything, in_turn, seed


@part("source/constraint-pairs", paper="arXiv:2412.15282, section 3 (from its abstract; UCT rule, bands and kinds are ours)",
      rows=(118,), needs=("policy",))  # fmt: skip
class ConstraintPairs:
    """Each round: constraints are added to prompts, the model answers, pairs are made of answers that keep more and fewer.

    *Difficulty*: ``least`` to ``most`` constraints a prompt, of ``kinds`` (all 23 by default), never contradicting each other;
    ``least: 0, most: 0`` takes prompts as they stand. *Contrast*: the scores s(x, y), shares of constraints kept, that a pair
    may have: ``high`` (chosen 1, rejected up to 1/2), ``low`` (both from 1/2, gap up to a third), ``both-low``, ``mixed`` (high
    and low in turn), ``any``. *Shared prefix*: ``method: rejection`` draws ``number`` answers independently; ``method: tree``
    searches partial answers, ``number`` continuations at each of ``iterations`` expansions chosen by UCT, and pairs siblings,
    which begin with the same tokens, ``prefix`` at least. Up to ``pairs`` a prompt, the widest gaps first, equal ones at random.

    ``reward`` scores answers; the bands suppose that it lies in [0, 1]. The round's file says of each pair its ``scores``, the
    tokens ``shared`` and those that ``differ`` [chosen, rejected]; losses on sums of log-probabilities see only the latter.
    """

    takes = (Prompted,)
    example: ClassVar = {}

    def __init__(
        self, *, method: Literal["rejection", "tree"] = "rejection", least: Index = 1, most: Index = 3, kinds: list[str] = [],  # noqa: B006
        contrast: Contrast = "any", reward: PartRef = "constraints",
        number: Annotated[int, Ge(2)] = 8, pairs: Count = 1, iterations: Count = 8, segment: Count = 16,
        exploration: NonNegative = 1.2, prefix: Index = 1, prompts: Count | None = None, max_new_tokens: Count = 128,
        temperature: NonNegative = 1.0, finished: bool = True,
    ) -> None:  # fmt: skip
        if least > most:
            raise UsageError(f"least = {least} is above most = {most}", where="source/constraint-pairs")
        constraints.draw(np.random.default_rng(0), most, kinds)
        self.method, self.least, self.most, self.kinds, self.contrast = method, least, most, kinds, contrast
        self.reward = reward_of(reward, "source/constraint-pairs", "reward")
        self.number, self.pairs, self.iterations, self.segment = number, pairs, iterations, segment
        self.exploration, self.prefix, self.prompts = exploration, prefix, prompts
        self.temperature, self.finished = temperature, finished
        self.longest = max_new_tokens

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Preference]:
        """The pairs of one round, from ``prompts`` prompts in turn."""
        asked = [self._constrained(e, rng) for e in in_turn(everything(inputs), self.prompts, round)]
        find = self._independent if self.method == "rejection" else self._searched
        found = find(asked, policy, rng)
        turns = enumerate(zip(asked, found, strict=True), round * len(asked))
        return [pair for turn, (e, own) in turns for pair in self._taken(e, own, turn, rng)]

    def _constrained(self, e: Prompted, rng: np.random.Generator) -> Prompted:
        """The prompt with constraints behind its last turn."""
        number = int(rng.integers(self.least, self.most + 1))
        if not number:
            return e
        text = constraints.compose(last(e.prompt), constraints.draw(rng, number, self.kinds))
        return replace(e, prompt=with_last(e.prompt, text), meta={**e.meta, "constraints": number})

    def _taken(self, e: Prompted, found: list[Candidate], turn: int, rng: np.random.Generator) -> list[Preference]:
        """The pairs taken of a prompt's candidates; ``turn`` counts the prompts of all rounds."""
        contrast = ("high", "low")[turn % 2] if self.contrast == "mixed" else self.contrast
        return [c.preference(e) for c in take(found, contrast, self.pairs, rng)]

    def _scores(self, asked: Sequence[Prompted], texts: list[list[str]]) -> list[np.ndarray]:
        return judged(self.reward, [e.prompt for e in asked], texts, known_answers(asked))

    # --- rejection sampling ----------------------------------------------------------------------------------------

    def _independent(self, asked: list[Prompted], policy: Policy, rng: np.random.Generator) -> list[list[Candidate]]:
        """Candidates among ``number`` independent answers to each prompt."""
        answers = policy.sample(
            [e.prompt for e in asked], self.number, max_new_tokens=self.longest, temperature=self.temperature, seed=seed(rng)
        )
        usable = [[a for a in own if a.text.strip() and (a.ended or not self.finished)] for own in answers]
        scores = self._scores(asked, [[a.text for a in own] for own in usable])
        wholes = [
            [tree.Whole(a.ids, a.text, float(s)) for a, s in zip(own, v, strict=True)]
            for own, v in zip(usable, scores, strict=True)
        ]
        return [[Candidate(a, b) for a in own for b in own if a.score > b.score] for own in wholes]

    # --- tree search -------------------------------------------------------------------------------------------------

    def _searched(self, asked: list[Prompted], policy: Policy, rng: np.random.Generator) -> list[list[Candidate]]:
        """Candidates among the siblings of a tree for each prompt; the trees grow together."""
        roots = [tree.Node(np.zeros(0, np.int32)) for _ in asked]
        for _ in range(self.iterations):
            paths = [tree.selected(root, self.exploration) for root in roots]
            grown = [i for i, p in enumerate(paths) if not p[-1].done and len(p[-1].ids) < self.longest]
            for path in (p for i, p in enumerate(paths) if i not in grown):
                tree.back_up(path, path[-1].value)
            if grown:
                self._grow([asked[i] for i in grown], [paths[i] for i in grown], policy, rng)
        alike = [[s for s in tree.siblings(root) if len(s[0].ids) >= self.prefix] for root in roots]
        return [[Candidate(x, y) for _, x, y in own] for own in alike]

    def _grow(self, asked: list[Prompted], paths: list[list[tree.Node]], policy: Policy, rng: np.random.Generator) -> None:
        """Continue the leaf of each path to the end, ``number`` times."""
        begun = [p[-1].ids for p in paths]
        answers = policy.sample(
            [e.prompt for e in asked], self.number, max_new_tokens=self.longest - min(map(len, begun)),
            temperature=self.temperature, seed=seed(rng), continued=begun,
        )  # fmt: skip

        def decode(ids: np.ndarray) -> str:
            return policy.bundle.tokenizer.decode(ids, skip_special_tokens=True)

        texts = [[decode(np.concatenate([b, a.ids])) for a in own] for b, own in zip(begun, answers, strict=True)]
        scores = self._scores(asked, texts)
        for path, own, whole, values in zip(paths, answers, texts, scores, strict=True):
            fits = [len(path[-1].ids) + len(a.ids) <= self.longest and bool(t.strip()) for a, t in zip(own, whole, strict=True)]
            usable = [f and (a.ended or not self.finished) for f, a in zip(fits, own, strict=True)]
            lengths = [tree.cut(a, decode, self.segment) for a in own]
            tree.expand(path, own, [float(v) * u for v, u in zip(values, usable, strict=True)], whole, lengths, usable)
