"""Ratings of several answers by several aspects: read from rows, asked from judges, averaged, repaired."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metier.core.data.examples import Preference, Prompt, Ranked
from metier.core.errors import UsageError
from metier.parts.source._pairs import judged

NA = float("nan")


@dataclass(frozen=True)
class Answered:
    """A prompt's answers with the ratings that its row brings."""

    prompt: Prompt
    texts: tuple[str, ...]
    ratings: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Aspect -> a rating per answer; NaN where there is none."""
    overall: Sequence[float] | None = None


def answered(e: Any) -> Answered:
    """The answers of a list, of a pair, or of a prompt whose row has ``completions``. Raises ``UsageError`` for fewer than two.

    Completions are texts, or objects with ``response`` (or ``text``), and if wanted ``annotations`` (aspect -> rating, or an
    object with ``Rating``) and ``overall_score``, as in the released data. A row may have ``ratings`` (aspect -> list) and
    ``overall`` (list) beside its completions.
    """
    if isinstance(e, Preference):
        return Answered(e.prompt, (e.chosen, e.rejected))
    given = e.completions if isinstance(e, Ranked) else e.meta.get("completions")
    if not isinstance(given, list | tuple) or len(given) < 2:
        raise UsageError("this row has no two completions to compare", where=e.id or None,
                         hint="Rows need prompt and completions: [answer, answer, …].")  # fmt: skip
    texts = tuple(_text(c, e.id) for c in given)
    ratings = {str(k): [rating(v) for v in values] for k, values in (e.meta.get("ratings") or {}).items()}
    annotated = [c.get("annotations") or {} if isinstance(c, Mapping) else {} for c in given]
    for name in {a for found in annotated for a in found}:
        ratings[name] = [rating(found.get(name)) for found in annotated]
    if isinstance(e, Ranked) and not ratings:
        ratings = {"score": list(e.scores)}
    for name, values in ratings.items():
        if len(values) != len(texts):
            raise UsageError(f"{len(values)} ratings of {name} for {len(texts)} completions", where=e.id or None)
    return Answered(e.prompt, texts, dict(sorted(ratings.items())), _overall(e, given))


def _text(completion: Any, id: str) -> str:
    found = completion if isinstance(completion, str) else None
    if isinstance(completion, Mapping):
        found = completion.get("response", completion.get("text"))
    if not isinstance(found, str):
        raise UsageError(
            f"a completion is {str(completion)[:60]!r}, expected a text or an object with response", where=id or None
        )
    return found


def _overall(e: Any, given: Sequence[Any]) -> list[float] | None:
    found = e.meta.get("overall") or [c.get("overall_score") if isinstance(c, Mapping) else None for c in given]
    values = [rating(v) for v in found]
    if len(values) != len(given):
        raise UsageError(f"{len(values)} overall scores for {len(given)} completions", where=e.id or None)
    return None if all(map(math.isnan, values)) else values


def rating(value: Any) -> float:
    """A rating as a number; NaN for what is not available (``N/A``, null, no number)."""
    if isinstance(value, Mapping):
        value = value.get("Rating")
    try:
        return float(value)
    except (TypeError, ValueError):
        return NA


def fine_score(ratings: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Mean over the aspects ``[A, K] -> [K]`` of the ratings that are available; NaN where none is."""
    values = np.atleast_2d(np.asarray(ratings, np.float64))
    there = ~np.isnan(values)
    return np.where(there.any(0), np.where(there, values, 0).sum(0) / np.maximum(there.sum(0), 1), NA)


def repaired(overall: float, fine: float) -> tuple[float, bool]:
    """``(score, ask again?)``: an overall 10 of an answer that is rated at most 2 is meant to be 1, and is doubtful up to 4.

    The released overall scores had 2628 wrong tens, from a "1" cut out of "10" and the like.
    """
    if overall != 10 or math.isnan(fine) or fine > 4:
        return overall, False
    return (1.0, False) if fine <= 2 else (overall, True)


def rate(reward: Any, prompts: Sequence[Prompt], texts: Sequence[tuple[str, ...] | list[str]], answers: list[str] | None,
         orders: Sequence[np.ndarray]) -> list[np.ndarray]:  # fmt: skip
    """Ratings ``[K]`` of each prompt's answers in their own order, judged in the order ``texts[i][orders[i][0]], …``.

    A fixed order would reward a place as much as an answer.
    """
    shown = [[own[k] for k in order] for own, order in zip(texts, orders, strict=True)]
    found = judged(reward, prompts, shown, answers)
    out = []
    for values, order in zip(found, orders, strict=True):
        back = np.empty(len(order))
        back[order] = values
        out.append(back)
    return out


def row_name(e: Any, a: Answered) -> str:
    """What tells a row from others: its id, or, when it has none, what is said in it."""
    return e.id or repr((a.prompt, a.texts))
