"""ALMA: synthetic prompts, a pool of answers of several checkpoints, and a judge whose scores are averaged."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Len

from metier.core.config import PartRef
from metier.core.data.examples import Preference, Prompt, Prompted
from metier.core.errors import UsageError
from metier.core.part import Count, Fraction, Index, Positive, part
from metier.core.policy import Policy
from metier.parts.source import _alma
from metier.parts.source._pairs import judged, known_answers, plain, reward_of
from metier.parts.source._rounds import everything, in_turn, seed, texts

TRIES = 4
"""Calls of the prompt writer for each prompt wanted, at most."""


@part("source/alma", paper="arXiv:2412.04305", rows=(116,), needs=("policy",))
class Alma:
    """Each round: prompts, given and written; a pool of answers to each; scores; the best and a low answer become a pair.

    *Prompts*: ``prompts`` given ones in turn (all by default) and ``synthesize`` new ones, which ``writer`` (a model, better the
    base than the aligned one; default: the current model) continues after ``demos`` given prompts, drawn anew for each call.
    Near-duplicates (``overlap``) and those outside ``shortest`` … ``longest`` words are filtered. *Answers*: a ``pool`` of so
    many to each, in equal shares from the current model and from ``checkpoints`` (folders of runs or models, such as those of
    earlier rounds), their ``temperatures`` in turn. *Judge*: ``reward``, called ``judge_samples`` times and averaged, for judges
    that sample; ``reward/judge`` gives the expectation over its score tokens at once, the limit of many samples. *Pairs*: the
    best answer against the one at fraction ``low`` of the order from the worst up; the margin is their difference.

    The paper's ten rounds restart from the base each time: for that, make each round a run of its own, with the earlier ones
    in ``checkpoints``. For a cheap judge train a reward model on such pairs (``objective: bradley-terry``) and name it in
    ``reward``: the paper's self-distillation. Its numbers and its pair rule are not in the abstract; the defaults are this
    library's, from memory of the paper. Not the translation model ALMA. Reads prompts.

    Raises ``UsageError`` when no prompts are asked for, or more demonstrations than there are prompts.
    """

    takes = (Prompted,)
    example: ClassVar = {"reward": "length"}

    def __init__(
        self, *, reward: PartRef, judge_samples: Count = 1, checkpoints: list[str] | None = None,
        pool: Annotated[int, Ge(2)] = 16, temperatures: Annotated[list[Positive], Len(1)] | None = None, low: Fraction = 0.0,
        prompts: Index | None = None, synthesize: Index = 0, demos: Count = 8, writer: str | None = None,
        overlap: Fraction = 0.7, shortest: Index = 3, longest: Count = 100, prompt_tokens: Count = 96,
        max_new_tokens: Count = 256, finished: bool = True,
    ) -> None:  # fmt: skip
        self.reward, self.judge_samples = reward_of(reward, "source/alma", "reward"), judge_samples
        self.checkpoints, self.pool, self.temperatures, self.low = checkpoints or [], pool, temperatures or [1.0], low
        self.prompts, self.synthesize, self.demos, self.writer = prompts, synthesize, demos, writer
        self.overlap, self.shortest, self.longest, self.prompt_tokens = overlap, shortest, longest, prompt_tokens
        self.max_new_tokens, self.finished = max_new_tokens, finished
        if prompts == synthesize == 0:
            raise UsageError("neither given prompts nor synthetic ones are asked for", where="source/alma.prompts")

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Preference]:
        """The pairs of one round, in random order."""
        given = everything(inputs)
        turn = [] if self.prompts == 0 else in_turn(given, self.prompts, round)
        written = self._written([plain(e.prompt) for e in given], policy, rng) if self.synthesize else []
        asked = [*turn, *(Prompted(p, meta={"synthetic": True}) for p in written)]
        pools = self._pools([e.prompt for e in asked], policy, rng)
        full = [(e, own) for e, own in zip(asked, pools, strict=True) if len(own) > 1]
        scores = self._scores([e for e, _ in full], [own for _, own in full])
        made = [
            Preference(e.prompt, own[best], own[low], float(s[best] - s[low]), meta=e.meta)
            for (e, own), s in zip(full, scores, strict=True) if (pair := _alma.best_and_low(s, self.low)) for best, low in [pair]
        ]  # fmt: skip
        return [made[i] for i in rng.permutation(len(made))]

    def _written(self, given: list[str], policy: Policy, rng: np.random.Generator) -> list[str]:
        """New prompts; fewer than asked for when the writer has nothing new to say."""
        if self.demos > len(given):
            raise UsageError(f"demos = {self.demos}, but {len(given)} prompts are given", where="source/alma.demos")
        writer = policy if self.writer is None else policy.other(self.writer)
        found: list[str] = []
        for _ in range(TRIES):
            calls = [self._call(given, rng) for _ in range(self.synthesize - len(found))]
            answers = writer.sample(calls, 1, max_new_tokens=self.prompt_tokens, seed=seed(rng)) if calls else []
            new = [p for (a,) in answers if (p := _alma.split_out(a.text, a.ended))]
            found += _alma.distinct(
                new, [*given, *found], overlap=self.overlap, shortest=self.shortest, longest=self.longest
            )  # fmt: skip
        return found

    def _call(self, given: list[str], rng: np.random.Generator) -> str:
        """Demonstrations of its own for every call: the same ones again would bring the same prompts again."""
        return _alma.few_shot([given[i] for i in rng.choice(len(given), self.demos, replace=False)])

    def _pools(self, prompts: list[Prompt], policy: Policy, rng: np.random.Generator) -> list[list[str]]:
        """The different usable answers to each prompt, the current model's first."""
        pools: list[list[str]] = [[] for _ in prompts]
        for i, number in enumerate(_alma.shares(self.pool, 1 + len(self.checkpoints))):
            if number == 0:
                break
            model = policy.other(self.checkpoints[i - 1]) if i else policy
            answers = model.sample(
                prompts, number, max_new_tokens=self.max_new_tokens, temperature=self.temperatures[i % len(self.temperatures)],
                seed=seed(rng),
            )  # fmt: skip
            pools = [own + texts(new, self.finished) for own, new in zip(pools, answers, strict=True)]
        return [list(dict.fromkeys(own)) for own in pools]

    def _scores(self, asked: list[Prompted], answers: list[list[str]]) -> list[np.ndarray]:
        """Of each prompt's answers, the mean of ``judge_samples`` judgements."""
        if not asked:
            return []
        prompts, known = [e.prompt for e in asked], known_answers(asked)
        drawn = [judged(self.reward, prompts, answers, known) for _ in range(self.judge_samples)]
        return [_alma.averaged(own) for own in zip(*drawn, strict=True)]
