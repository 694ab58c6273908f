"""Preference pairs from answers that judges rate aspect by aspect (arXiv:2310.01377)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge

from metier.core.config import PartRef
from metier.core.context import derive_seed
from metier.core.data.examples import Preference, Prompted, Ranked
from metier.core.errors import UsageError
from metier.core.part import Count, NonNegative, part
from metier.core.policy import Policy
from metier.parts.source._pairs import Builder, choose, known_answers, preference, reward_of
from metier.parts.source._pool import Pool, completions
from metier.parts.source._ratings import Answered, answered, fine_score, rate, repaired, row_name
from metier.parts.source._rounds import everything, in_turn

ID = "source/ultrafeedback"
BLOCK = 64
"""Prompts judged together."""


@part("source/ultrafeedback", paper="arXiv:2310.01377, section 2", rows=(79,))
class Ultrafeedback:
    """Several answers per prompt, each rated by every aspect, become pairs by their mean rating.

    ``aspects`` names reward parts: ``{helpfulness: {judge: {model: …, rubric: …}}, truthfulness: …}``. Each sees all answers to a
    prompt in a random order of its own. Their scales should agree, since the fine score is the plain mean of the ratings that
    are available. Without ``aspects`` the ratings that rows bring are used. ``by`` is what pairs are made from: ``fine``,
    ``overall`` (``overall_score`` of the rows, or what the reward ``overall`` says; tens that the aspects contradict are
    repaired as in the authors' release) or one aspect. ``builder`` and ``margin`` as in ``source/pairs``.

    Answers come with the data: lists, pairs (judged anew), or prompts whose rows have ``completions``; nothing but the judges is
    needed then. Or ``sample: 4`` answers are written in each round, each by another member of a pool: the model being trained and
    ``models`` (folders, runs, names), each at every one of ``temperatures``; with a system prompt for one of ``principles``
    (odds of helpfulness, truthfulness, honesty, calibration), which the pair does not keep. Critiques in words are not made.
    An answer is judged once in a run.
    """

    example: ClassVar = {"aspects": {"length": {"length": {"unit": "characters"}}}}

    def __init__(
        self, *, aspects: dict[str, PartRef] = {}, overall: PartRef | None = None, by: str = "fine",  # noqa: B006
        builder: Builder = "top-random", margin: NonNegative = 0.0, sample: Annotated[int, Ge(2)] | None = None,
        models: list[str] = [], temperatures: list[NonNegative] = [1.0], principles: dict[str, NonNegative] = {},  # noqa: B006
        prompts: Count | None = None, max_new_tokens: Count = 64, finished: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.judges = {name: reward_of(ref, ID, f"aspects.{name}") for name, ref in aspects.items()}
        self.overall = None if overall is None else reward_of(overall, ID, "overall")
        if by not in ("fine", "overall", *aspects) and aspects:
            raise UsageError(f"by = {by!r} is neither fine, overall nor an aspect ({', '.join(aspects)})", where=ID)
        if sample and not aspects and not (by == "overall" and overall):
            raise UsageError("answers of the model need judges", where=ID, hint="Say aspects: {name: reward}.")
        self.builder: Builder = builder
        self.by, self.margin, self.seed, self.sample, self.prompts = by, margin, seed, sample, prompts
        self.pool = Pool(tuple(models), tuple(temperatures), principles, max_new_tokens, finished)
        self.takes = (Prompted,) if sample else (Ranked, Preference, Prompted)
        self.needs = frozenset({"policy"} if sample else ())
        self._scores: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}

    def stream(
        self, inputs: Mapping[str, Sequence[Any]], *, epoch: int, rng: np.random.Generator, progress: Callable[[], float]
    ) -> Iterator[Preference]:
        """The pairs of one epoch; prompts in random order, judged in blocks as they come."""
        rows = everything(inputs)
        waiting = iter(rng.permutation(len(rows)))
        while block := [rows[i] for i in islice(waiting, BLOCK)]:
            given = [answered(e) for e in block]
            found = self._pairs(block, given, self._judged(block, given), rng)
            yield from (found[i] for i in rng.permutation(len(found)))

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Preference]:
        """The pairs of one round from answers of the model, to ``prompts`` prompts in turn."""
        assert self.sample
        block = in_turn(everything(inputs), self.prompts, round)
        written = completions(policy, [e.prompt for e in block], self.sample, rng, self.pool)
        both = [(e, Answered(e.prompt, texts)) for e, texts in zip(block, written, strict=True) if len(texts) > 1]
        block, found = [e for e, _ in both], [a for _, a in both]
        return self._pairs(block, found, self._asked(block, found), rng)

    def _pairs(
        self, block: list[Any], found: list[Answered], scores: list[np.ndarray], rng: np.random.Generator
    ) -> list[Preference]:
        return [
            preference(e, a.prompt, a.texts, s, pair)
            for e, a, s in zip(block, found, scores, strict=True)
            for pair in choose(self.builder, s, rng, texts=a.texts, margin=self.margin)
        ]

    def _judged(self, block: list[Any], found: list[Answered]) -> list[np.ndarray]:
        """The score of every answer; each row is judged once."""
        keys = [(row_name(e, a), a.texts) for e, a in zip(block, found, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._scores]
        if new:
            scores = self._asked([block[i] for i in new], [found[i] for i in new])
            self._scores |= {keys[i]: s for i, s in zip(new, scores, strict=True)}
        return [self._scores[key] for key in keys]

    def _asked(self, block: list[Any], found: list[Answered]) -> list[np.ndarray]:
        ratings = self._ratings(block, found)
        fine = [fine_score(list(r.values())) if r else np.full(len(a.texts), np.nan) for r, a in zip(ratings, found, strict=True)]
        if self.by == "fine":
            return fine
        if self.by == "overall":
            return self._overall(block, found, fine)
        if lacking := next((e for e, r in zip(block, ratings, strict=True) if self.by not in r), None):
            raise UsageError(f"this row has no rating of {self.by}", where=lacking.id or None)
        return [np.asarray(r[self.by], np.float64) for r in ratings]

    def _ratings(self, block: list[Any], found: list[Answered]) -> list[Mapping[str, Any]]:
        """Aspect -> ratings ``[K]`` of each prompt."""
        if not self.judges:
            bare = next((e for e, a in zip(block, found, strict=True) if not a.ratings and self.by != "overall"), None)
            if bare is not None:
                raise UsageError("this row has no ratings, and nobody is to judge it", where=bare.id or None,
                                 hint=f"Give {ID} judges: aspects: {{name: reward}}.")  # fmt: skip
            return [a.ratings for a in found]
        asked = {name: self._rated(name, judge, block, found) for name, judge in self.judges.items()}
        return [{name: values[i] for name, values in asked.items()} for i in range(len(block))]

    def _rated(self, name: str, judge: Any, block: list[Any], found: list[Answered]) -> list[np.ndarray]:
        """One judge's ratings; its order of the answers depends on the row only, so that a resumed run judges alike."""
        orders = [
            np.random.default_rng(derive_seed("order", self.seed, name, row_name(e, a))).permutation(len(a.texts))
            for e, a in zip(block, found, strict=True)
        ]
        return rate(judge, [a.prompt for a in found], [a.texts for a in found], known_answers(block), orders)

    def _overall(self, block: list[Any], found: list[Answered], fine: list[np.ndarray]) -> list[np.ndarray]:
        """Overall scores after repair; what is doubtful is asked again on its own, or has no score when nobody can be asked."""
        told = self._rated("overall", self.overall, block, found) if self.overall and not all(a.overall for a in found) else None
        out = []
        for i, (e, a) in enumerate(zip(block, found, strict=True)):
            given = a.overall if a.overall is not None else told[i] if told else np.full(len(a.texts), np.nan)
            scores = [repaired(float(o), float(f)) for o, f in zip(given, fine[i], strict=True)]
            again = [self._again(e, a, k) if ask else value for k, (value, ask) in enumerate(scores)]
            out.append(np.array(again, np.float64))
        return out

    def _again(self, e: Any, a: Answered, k: int) -> float:
        if self.overall is None:
            return float("nan")
        return float(rate(self.overall, [a.prompt], [[a.texts[k]]], known_answers([e]), [np.zeros(1, int)])[0][0])
