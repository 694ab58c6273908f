"""How often a reward, explicit or implied by a tuned model, ranks pairs right (Lin et al., 2024, arXiv:2409.03650)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metier.core.batch import Pairs, Rewards
from metier.core.errors import UsageError
from metier.core.intervals import wilson
from metier.core.layout import Layout
from metier.core.part import Count, part
from metier.core.preferences import log_ratios, means
from metier.core.probing import Probe
from metier.core.scores import score
from metier.parts.probe._pairs import encoded, paired

Array = np.ndarray


def ranked(chosen: Array, rejected: Array) -> dict[str, Any]:
    """Accuracy of rewards ``[N]`` over pairs with its interval, a tie counting one half; share of ties; mean margin."""
    margin = np.asarray(chosen, float) - np.asarray(rejected, float)
    wins = float(np.sum((margin > 0) + 0.5 * (margin == 0)))
    low, high = wilson(wins, len(margin))
    return {
        "accuracy": wins / len(margin), "interval": [low, high], "ties": float(np.mean(margin == 0)),
        "margin": float(margin.mean()),
    }  # fmt: skip


@part("probe/reward-accuracy", paper="arXiv:2409.03650", rows=(102,))
def reward_accuracy(
    probe: Probe, *, data: dict[str, str] | None = None, limit: Count | None = None, max_length: Count = 1024
) -> dict[str, Any]:
    """Pair accuracy with a 95 % Wilson interval on every named set of ``data`` (default: the pairs probed, as ``data``).

    ``reward`` says what ranks: ``explicit``, the head of a reward model; ``implicit``, ``log π/π_ref`` of a model tuned with a
    reference; ``likelihood``, ``log π`` of any other. The latter two are given twice, summed over the answer and, under
    ``per_token``, divided by its length: the sum favours a length, and a shift of lengths would pass for a failure to
    generalise. A positive factor such as DPO's β, and any term that depends on the prompt only, change nothing. At the start of
    training every implicit reward ties: 0.5.

    Compare two rewards at equal accuracy in distribution, not after equally many steps. Sets without pairs are left out.

    Raises ``UsageError`` for further sets when the run keeps its reference scores in a cache: they hold its own data only.
    """
    sets = {"data": list(probe.layouts)}
    if data is not None:
        sets = {name: encoded(probe, where, max_length=max_length, limit=limit) for name, where in data.items()}
    found = {name: own for name, layouts in sets.items() if (own := paired(layouts))}
    reference = getattr(getattr(probe.module, "module", probe.module), "reference", None)
    kept = any(x.reference is not None for x in probe.layouts)
    if kept and data is not None and probe.reads is not Rewards:
        raise UsageError(
            "probe/reward-accuracy: the run's reference scores are kept for its own data only", hint="Use reference_scores: live."
        )
    kind = "explicit" if probe.reads is Rewards else "implicit" if reference is not None or kept else "likelihood"
    measure = {"explicit": _explicit, "implicit": _implicit, "likelihood": _likelihood}[kind]
    rows = [{"name": name, **_summary([measure(probe, x, reference) for x in own])} for name, own in found.items()]
    return {"reward": kind, "sets": rows}


Values = tuple[Tensor, ...]
"""Rewards ``[B]`` of chosen and rejected answers, then both per token where there is such a thing."""


def _summary(found: Sequence[Values]) -> dict[str, Any]:
    columns = [torch.cat(v).double().cpu().numpy() for v in zip(*found, strict=True)]
    out = {"pairs": len(columns[0]), **ranked(columns[0], columns[1])}
    return out if len(columns) == 2 else {**out, "per_token": ranked(columns[2], columns[3])}


def _explicit(probe: Probe, layout: Layout, reference: Any) -> Values:
    found = probe.score(layout, reads=Rewards)
    assert isinstance(found, Rewards)
    return found.chosen, found.rejected


def _likelihood(probe: Probe, layout: Layout, reference: Any) -> Values:
    found = probe.score(layout, reads=Pairs)
    assert isinstance(found, Pairs)
    return found.chosen_logps, found.rejected_logps, *means(found)


def _implicit(probe: Probe, layout: Layout, reference: Any) -> Values:
    with torch.no_grad(), probe.engine.autocast():
        there = layout.to(probe.engine.device)
        found = score(probe.model, there, Pairs, reference=reference, needs=frozenset({"reference"}))
    assert isinstance(found, Pairs)
    chosen, rejected = log_ratios(found)
    return chosen, rejected, chosen / found.chosen_len.clamp(min=1), rejected / found.rejected_len.clamp(min=1)
