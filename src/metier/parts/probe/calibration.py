"""Calibration: does confidence equal accuracy? (expected calibration error, arXiv:1706.04599, section 2)."""

from typing import Any, Literal

import torch
from torch import Tensor

from metier.core.batch import Labels, Tokens
from metier.core.part import Count, part
from metier.core.probing import Probe


@part("probe/calibration", paper="arXiv:1706.04599", rows=(103,))
def calibration(probe: Probe, *, bins: Count = 15, binning: Literal["width", "mass"] = "width") -> dict[str, Any]:
    """``ECE = sum_b n_b / n |accuracy_b - confidence_b|`` over bins of the confidence in the predicted class
    or token.

    A classifier's units are examples; any other model's are target tokens, predicted by the most likely next
    token. Bins have equal width, or (nearly) equal mass. ``gap`` is mean confidence minus accuracy: positive
    is overconfident. ``brier`` is ``(confidence - correct)^2`` on average, ``nll`` the mean negative
    log-likelihood of the truth.
    """
    found = [_one(probe, layout) for layout in probe.layouts]
    confidence, correct, logp = (torch.cat([f[i] for f in found]).double().cpu() for i in range(3))
    rows = table(confidence, correct, bins, binning)
    n = len(confidence)
    accuracy, mean = float(correct.mean()), float(confidence.mean())
    return {
        "ece": sum(r["count"] / n * abs(r["accuracy"] - r["confidence"]) for r in rows),
        "max_error": max(abs(r["accuracy"] - r["confidence"]) for r in rows),
        "accuracy": accuracy, "confidence": mean, "gap": mean - accuracy,
        "brier": float(((confidence - correct) ** 2).mean()), "nll": float(-logp.mean()), "count": n,
        "unit": "example" if probe.reads is Labels else "token", "bins": rows,
    }  # fmt: skip


def _one(probe: Probe, layout: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, correctness and log-probability of the truth, each ``[units]``."""
    if probe.reads is Labels:
        scored = probe.score(layout)
        logits, truth = scored.logits, scored.label  # type: ignore[union-attr]
    else:
        scored = probe.score(layout, reads=Tokens, needs=("logits",))
        logits, truth = scored.logits, scored.targets  # type: ignore[union-attr]
    assert logits is not None
    assert truth is not None
    logps = torch.log_softmax(logits.double(), -1)
    best, predicted = logps.max(-1)
    return best.exp(), (predicted == truth).double(), logps.gather(1, truth.unsqueeze(1)).squeeze(1)


def table(confidence: Tensor, correct: Tensor, bins: int, binning: str) -> list[dict[str, float]]:
    """Count, accuracy and confidence of every bin that holds something; bins are ``(low, high]``."""
    if binning == "width":
        index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    else:
        rank = confidence.argsort(stable=True).argsort(stable=True)
        index = rank * bins // len(confidence)
    rows = []
    for b in index.unique().tolist():
        inside = index == b
        rows.append({
            "count": int(inside.sum()),
            "low": float(confidence[inside].min()), "high": float(confidence[inside].max()),
            "confidence": float(confidence[inside].mean()), "accuracy": float(correct[inside].mean()),
        })  # fmt: skip
    return rows
