"""The three measurements of a preference set, for any way of training a reward model on rows of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metier.parts.probe._curves import flips, invariance, saturation, subset
from metier.parts.probe._linear import Fitted

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
Learn = Callable[[np.ndarray, np.ndarray], Fitted]
"""``(rows, signs) -> Fitted``: a reward model trained on those rows, exchanged where the sign is -1."""


@dataclass(frozen=True)
class Scale:
    """Accuracy over the number of pairs trained on; ``rows`` for people."""

    n: Sequence[float]
    accuracy: Sequence[float]
    n_95: float | None
    rows: list[dict[str, float]]


@dataclass(frozen=True)
class Noise:
    """Accuracy over the share of flipped labels, of ``RATES``; ``rows`` tell the mean ``|r_w - r_l|`` too."""

    accuracy: Sequence[float]
    area: float | None
    q_half: float | None
    rows: list[dict[str, float]]


def scale(learn: Learn, same: Sequence[int] | np.ndarray, seeds: int) -> Scale:
    """M1: accuracy over the size of the training set; ``same [N]`` numbers its pairs, copies alike."""
    drawn = [[subset(same, share, seed) for seed in range(seeds)] for share in SHARES]
    n = [float(np.mean([len(r) for r in own])) for own in drawn]
    rows = [{"n": x, **_told([learn(r, np.ones(len(r))) for r in own])} for x, own in zip(n, drawn, strict=True)]
    accuracy = [r["accuracy"] for r in rows]
    return Scale(n, accuracy, saturation(n, accuracy), rows)


def noise(learn: Learn, number: int, seeds: int) -> Noise:
    """M2: accuracy and mean ``|r_w - r_l|`` over the share of training labels that are flipped."""
    every = np.arange(number)
    rows = [{"q": q, **_told([learn(every, flips(number, q, seed)) for seed in range(seeds)])} for q in RATES]
    accuracy = [r["accuracy"] for r in rows]
    return Noise(accuracy, *invariance(RATES, accuracy), rows)


def information(learn: Learn, similarity: np.ndarray, seeds: int, bins: int = 3) -> dict[str, Any]:
    """M3: accuracy after training on equally many pairs of each quantile of a similarity ``[N]`` of their answers."""
    order = np.argsort(similarity, kind="stable")
    parts = np.array_split(order, bins)
    size = max(1, int(0.8 * min(map(len, parts))))  # seeds differ in what is left out
    found = []
    for own in parts:
        drawn = [own[np.random.default_rng([seed, 3]).permutation(len(own))[:size]] for seed in range(seeds)]
        scores = [learn(rows, np.ones(size)).accuracy for rows in drawn]
        found.append({
            "low": float(similarity[own].min()), "high": float(similarity[own].max()), "pairs": size,
            "accuracy": float(np.mean(scores)), "se": _se(scores),
        })  # fmt: skip
    counts, edges = np.histogram(similarity, bins=10)
    return {"bins": found, "histogram": {"counts": counts.tolist(), "edges": edges.tolist()}}


def _told(found: Sequence[Fitted]) -> dict[str, float]:
    values = [f.accuracy for f in found]
    return {"accuracy": float(np.mean(values)), "se": _se(values), "confidence": float(np.mean([f.confidence for f in found]))}


def _se(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
