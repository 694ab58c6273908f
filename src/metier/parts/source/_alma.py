"""ALMA's components as pure functions: prompts from demonstrations, their filter, scores from judgements, pairs from scores."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

GRAM = 3
"""Words of the n-grams that near-duplicates share."""


def few_shot(demonstrations: Sequence[str], mark: str = "Task: ", stop: str = "\n###\n") -> str:
    """What a base model continues with a new prompt: each demonstration between ``mark`` and ``stop``, then ``mark``."""
    return "".join(f"{mark}{d}{stop}" for d in demonstrations) + mark.rstrip()


def split_out(text: str, ended: bool, stop: str = "\n###\n") -> str | None:
    """The new prompt of a continuation: what stands before ``stop``; ``None`` when it is empty or did not end properly."""
    found, marker, _ = text.partition(stop.strip() or stop)
    return (found.strip() or None) if marker or ended else None


def distinct(
    candidates: Sequence[str], known: Sequence[str] = (), *, overlap: float = 0.7, shortest: int = 3, longest: int = 100
) -> list[str]:
    """The candidates that are new, in their order: the filter of synthetic prompts.

    Left out are those of fewer than ``shortest`` or more than ``longest`` words, and those whose word trigrams have a Jaccard
    index of ``overlap`` or more with one of ``known`` or an earlier kept one. Case and punctuation at the ends of words do
    not count. Applied again it changes nothing.
    """
    seen: list[frozenset[tuple[str, ...]]] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def near(grams: frozenset[tuple[str, ...]]) -> bool:
        shared = Counter(i for g in grams for i in holders[g])
        return any(n >= overlap * (len(grams) + len(seen[i]) - n) for i, n in shared.items())

    def remember(grams: frozenset[tuple[str, ...]]) -> None:
        for g in grams:
            holders[g].append(len(seen))
        seen.append(grams)

    for text in known:
        remember(_grams(text))
    kept = []
    for text in candidates:
        grams = _grams(text)
        if shortest <= len(text.split()) <= longest and grams and not near(grams):
            remember(grams)
            kept.append(text)
    return kept


def _grams(text: str) -> frozenset[tuple[str, ...]]:
    """The word n-grams of a text; of a shorter one, all its words as one."""
    words = [w for w in (w.strip(".,;:!?\"'()[]").lower() for w in text.split()) if w]
    if len(words) < GRAM:
        return frozenset([tuple(words)] if words else [])
    return frozenset(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))


def averaged(judgements: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """The score of each answer ``[K]`` from judgements ``[s, K]``: their mean.

    Independent noise of sd q becomes noise of sd ``q/√s``, so a pair whose true gap is g is ordered rightly with probability
    ``Φ(g √s / (q √2))``; for drawn grades the limit is ``Σ_k k p(k)``.
    """
    return np.mean(np.asarray(judgements, np.float64), axis=0)


def best_and_low(scores: Sequence[float] | np.ndarray, low: float = 0.0) -> tuple[int, int] | None:
    """Indices of the best answer of a pool and of the one at the fraction ``low`` of the order from the worst (0) up.

    Among equal scores the earlier answer comes first; answers without a score (NaN) are left out. ``None`` when both have the
    same score.
    """
    s = np.asarray(scores, np.float64)
    there = np.flatnonzero(~np.isnan(s))
    if not len(there):
        return None
    upward = there[np.argsort(s[there], kind="stable")]
    best, other = int(np.nanargmax(s)), int(upward[int(low * (len(there) - 1))])
    return (best, other) if s[best] > s[other] else None


def shares(total: int, models: int) -> list[int]:
    """How many of ``total`` answers each of the models gives: as equal as can be, the first ones more."""
    return [total // models + (i < total % models) for i in range(models)]
