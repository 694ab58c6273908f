"""Sentiment by a list of words, or by VADER."""

import re
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from metier.core.errors import UsageError
from metier.core.part import part

WORD = re.compile(r"\w+(?:['’-]\w+)*")


@part("reward/lexicon", paper="Hutto & Gilbert, ICWSM 2014 (VADER)")
def lexicon(
    prompts: list[str],
    completions: list[list[str]],
    answers: list[str] | None,
    *,
    good: list[str] = [],  # noqa: B006
    bad: list[str] = [],  # noqa: B006
    per: Literal["mean", "count"] = "mean",
    vader: bool = False,
) -> Tensor:
    """(good words - bad words) of a completion, with ``per: mean`` over its number of words; ``[P, K]``.

    Words are compared without case, every occurrence counts. With ``vader`` the completion's compound score in [-1, 1] of VADER
    (valences of words, with rules for negation, emphasis and capitals) instead; needs the package ``vaderSentiment``. Empty
    completions get 0. Raises ``UsageError`` without words and without ``vader``, with both, or for an entry that is no word.
    """
    if vader == bool(good or bad):
        raise UsageError("reward/lexicon takes either lists of good and bad words or vader: true")
    positive, negative = _words(good, "good"), _words(bad, "bad")
    if both := positive & negative:
        raise UsageError(f"{sorted(both)[0]!r} is in both lists", where="reward/lexicon")
    rewards = torch.zeros(len(prompts), max(map(len, completions), default=0))
    for row, written in zip(rewards, completions, strict=True):
        for k, text in enumerate(written):
            row[k] = _compound(text) if vader else _count(text, positive, negative, per == "mean")
    return rewards


lexicon.example = {"good": ["kind", "nine"], "bad": ["not"]}  # type: ignore[attr-defined]


def _words(given: list[str], option: str) -> frozenset[str]:
    for word in given:
        if not WORD.fullmatch(word):
            raise UsageError(f"{word!r} is not one word", where=f"reward/lexicon, option {option}")
    return frozenset(w.lower() for w in given)


def _count(text: str, good: frozenset[str], bad: frozenset[str], mean: bool) -> float:
    found = [w.lower() for w in WORD.findall(text)]
    total = sum(w in good for w in found) - sum(w in bad for w in found)
    return total / max(1, len(found)) if mean else float(total)


def _compound(text: str) -> float:
    return _vader().polarity_scores(text)["compound"] if text.strip() else 0.0


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UsageError("reward/lexicon with vader: true needs the package vaderSentiment",
                         hint="pip install 'metier[real]'") from None  # fmt: skip
    return SentimentIntensityAnalyzer()
