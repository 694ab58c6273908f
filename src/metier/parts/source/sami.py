"""SAMI: one answer under each of several constitutions."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Len

from metier.core.data.examples import Crossed, Message, Prompt, Prompted
from metier.core.errors import UsageError
from metier.core.part import Count, NonNegative, part
from metier.core.policy import Policy
from metier.core.sample import Answer
from metier.parts.source._rounds import everything, in_turn, seed

Pair = Annotated[list[str], Len(2, 2)]
WHERE = "source/sami"


def constitutions(principles: Sequence[Sequence[str]], number: int, size: int, rng: np.random.Generator) -> list[list[str]]:
    """``number`` constitutions of ``size`` principles, each in random order.

    All are about the same ``size`` principles, drawn for this query; each takes the principle or its antithesis by a fair
    coin, and no two take the same sides.
    """
    about = [principles[i] for i in rng.choice(len(principles), size, replace=False).tolist()]
    sides: dict[tuple[int, ...], None] = {}
    while len(sides) < number:
        sides[tuple(rng.integers(2, size=size).tolist())] = None
    return [[about[k][side[k]] for k in rng.permutation(size).tolist()] for side in sides]


def under(prompt: Prompt, constitution: Sequence[str], template: str, separator: str) -> Prompt:
    """The prompt with the constitution; of a conversation, its last message is filled in."""

    def filled(text: str) -> str:
        return template.replace("{constitution}", separator.join(constitution)).replace("{prompt}", text)

    if isinstance(prompt, str):
        return filled(prompt)
    return (*prompt[:-1], Message(prompt[-1].role, filled(prompt[-1].content)))


def kept(answers: Sequence[Answer], markers: Sequence[str], finished: bool = True) -> tuple[str, ...] | None:
    """The format filter: each answer up to the first turn marker; ``None`` when one is empty or unfinished, or two are equal.

    An answer in which a marker came has ended there.
    """
    found = []
    for a in answers:
        ends = [a.text.find(m) for m in markers if m in a.text]
        if not ends and finished and not a.ended:
            return None
        found.append(a.text[: min(ends)].rstrip() if ends else a.text)
    whole = {t.strip() for t in found}
    return tuple(found) if len(whole) == len(found) and "" not in whole else None


@part("source/sami", paper="arXiv:2404.14313, section 3", rows=(141,), needs=("policy",))
class Sami:
    """Each round: for every prompt ``number`` constitutions, one answer of the current model under each.

    ``principles`` are pairs ``[principle, antithesis]``, such as ``[Be concise., Be elaborate.]``, written once, by anybody. A
    constitution has ``size`` of them (all by default) in random order. ``template`` puts it in front of the prompt (it is split
    by ``separator``); both constitutions and answers are kept in the round's file. No labels: use ``objective: sami``,
    which makes each answer most likely under its own constitution.

    An answer is cut at the first of ``markers`` (of the next turn); a prompt is left out when an answer is empty, did not end
    before ``max_new_tokens`` (with ``finished``), or equals another. ``prompts`` limits a round, in turn. Few steps at a small
    learning rate are meant: what does not fit is pushed down without bound. Reads prompts.

    Raises ``UsageError`` when there are fewer than ``number`` different constitutions, or the template lacks a place.
    """

    takes = (Prompted,)
    example: ClassVar = {"principles": [["Be brief.", "Be elaborate."]]}

    def __init__(
        self, *, principles: Annotated[list[Pair], Len(1)], number: Annotated[int, Ge(2)] = 2, size: Count | None = None,
        template: str = "{constitution}\n\n{prompt}", separator: str = "\n", markers: list[str] | None = None,
        prompts: Count | None = None, max_new_tokens: Count = 200, temperature: NonNegative = 1.0, finished: bool = True,
    ) -> None:  # fmt: skip
        self.principles, self.number, self.size = principles, number, size or len(principles)
        self.template, self.separator, self.markers = template, separator, markers or []
        self.prompts, self.max_new_tokens, self.temperature, self.finished = prompts, max_new_tokens, temperature, finished
        self._check()

    def _check(self) -> None:
        if self.size > len(self.principles):
            raise UsageError(f"size = {self.size}, but there are {len(self.principles)} principles", where=f"{WHERE}.size")
        if self.number > 2**self.size:
            raise UsageError(
                f"{self.size} principles give {2**self.size} different constitutions, fewer than number = {self.number}",
                where=f"{WHERE}.number",
            )
        if same := [p for p, other in self.principles if p == other]:
            raise UsageError(f"{same[0]!r} is its own antithesis", where=f"{WHERE}.principles")
        if any(self.template.count(place) != 1 for place in ("{constitution}", "{prompt}")):
            raise UsageError(
                f"template = {self.template!r}: must hold {{constitution}} and {{prompt}} once", where=f"{WHERE}.template"
            )

    def round(
        self, inputs: Mapping[str, Sequence[Any]], *, policy: Policy, round: int, rng: np.random.Generator
    ) -> list[Crossed]:
        """The matrices of one round, in random order."""
        turn = in_turn(everything(inputs), self.prompts, round)
        drawn = (constitutions(self.principles, self.number, self.size, rng) for _ in turn)
        asked = [
            tuple(under(e.prompt, c, self.template, self.separator) for c in own) for e, own in zip(turn, drawn, strict=True)
        ]
        answers = policy.sample(
            [p for own in asked for p in own], 1, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=seed(rng)
        )
        rows = [[answers[i * self.number + k][0] for k in range(self.number)] for i in range(len(turn))]
        texts = [kept(row, self.markers, self.finished) for row in rows]
        made = [Crossed(p, t, meta=e.meta) for e, p, t in zip(turn, asked, texts, strict=True) if t is not None]
        return [made[i] for i in rng.permutation(len(made))]
