"""Pairs labelled by a reward model: which are kept, in which order, and how right they are."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from metier.core.data.examples import Preference


def selected(p: np.ndarray, threshold: float) -> np.ndarray:
    """``[N]`` bool: the confidence ``max(p, 1 - p)`` is above the threshold; ``p = ½`` says nothing and is never selected."""
    return (np.maximum(p, 1 - p) > threshold) & (p != 0.5)


def pseudo_labelled(pool: Sequence[Preference], p: np.ndarray, picked: np.ndarray) -> list[Preference]:
    """The picked pairs in the order that a model gives their answers.

    ``p [N]`` is its probability that the answer standing first (as ``chosen``) is the better one; where it is below ½ the
    answers, and what ``meta`` says of each, are exchanged.
    """
    return [
        _marked(e if own > 0.5 else _exchanged(e), float(max(own, 1 - own)))
        for e, own, kept in zip(pool, p, picked, strict=True) if kept
    ]  # fmt: skip


def _marked(e: Preference, confidence: float) -> Preference:
    return replace(e, margin=None, meta={**e.meta, "pseudo": True, "confidence": confidence})


def _exchanged(e: Preference) -> Preference:
    other = {"chosen": "rejected", "rejected": "chosen"}

    def name(key: str) -> str:
        stem, _, end = key.rpartition("_")
        return f"{stem}_{other[end]}" if stem and end in other else key

    return replace(e, chosen=e.rejected, rejected=e.chosen, meta={name(k): v for k, v in e.meta.items()})


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """``Σ_b n_b/n |correct_b - confidence_b|`` over bins of equal width of the confidence, which lies in [½, 1]."""
    place = np.minimum((np.asarray(confidence) - 0.5) * 2 * bins, bins - 1).astype(int)
    gaps = [abs(float(np.sum((correct - confidence)[place == b]))) for b in range(bins)]
    return sum(gaps) / len(confidence) if len(confidence) else 0.0


def report(pool: Sequence[Preference], p: np.ndarray, picked: np.ndarray) -> dict[str, Any]:
    """What a round's labels are like: the share picked, and where ``gold_chosen`` and ``gold_rejected`` in ``meta`` tell
    the truth, their accuracy overall (½ for p = ½) and among the picked, and the calibration error."""
    confidence = np.maximum(p, 1 - p)
    found: dict[str, Any] = {"pool": len(pool), "selected": float(picked.mean()) if len(pool) else 0.0}
    if any("gold_chosen" not in e.meta or "gold_rejected" not in e.meta for e in pool):
        return found
    truth = np.array([np.sign(e.meta["gold_chosen"] - e.meta["gold_rejected"]) for e in pool])
    right, told = (np.sign(p - 0.5) * truth + 1) / 2, truth != 0
    return found | {
        "accuracy": float(right[told].mean()) if told.any() else None,
        "selected_accuracy": float(right[told & picked].mean()) if (told & picked).any() else None,
        "calibration_error": calibration_error(confidence[told], right[told]),
    }
