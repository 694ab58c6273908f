"""Equal budgets: a run's length from tokens, FLOPs or seconds.

FLOPs are those of matrix products and attention in one real step, counted by :mod:`metier.core.flops`;
seconds come from timing a few steps. Both probe with batches of the run's own data and leave no trace.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from metier.core.api import Result, train

PROBE_STEPS = 6
LENGTHS = ("steps", "epochs", "tokens")
UNWANTED = (*LENGTHS, "eval_every", "save_every", "max_seconds")
"""Settings of ``train`` that a probe leaves out."""


def apply_budget(run: Mapping[str, Any], budget: Mapping[str, float]) -> dict[str, Any]:
    """The run file with its length set so that it spends the budget (``{"tokens": …}`` or flops, seconds)."""
    changed = {**run, "train": dict(run.get("train", {}))}
    if not budget:
        return changed
    ((kind, amount),) = budget.items()
    for key in LENGTHS:
        changed["train"].pop(key, None)
    if kind == "tokens":
        changed["train"]["tokens"] = int(amount)
    elif kind == "flops":
        changed["train"]["steps"] = max(1, round(amount / step_flops(changed)))
    else:
        changed["train"]["steps"] = max(1, round(amount / step_seconds(changed)))
    return changed


def step_flops(run: Mapping[str, Any]) -> float:
    """Matrix-product FLOPs of one optimizer step of a run."""
    return _probe(run, 1).flops


def step_seconds(run: Mapping[str, Any]) -> float:
    """Median seconds of one optimizer step of a run, the first step left out."""
    events = _probe(run, PROBE_STEPS).events
    return median(e["seconds"] for e in events if e["event"] == "step" and e["step"] > 1)


def _probe(run: Mapping[str, Any], steps: int) -> Result:
    kept = {k: v for k, v in run.get("train", {}).items() if k not in UNWANTED}
    data = {**run["data"], "eval": None, "eval_split": None, "eval_fraction": 0.0}
    probe = {**run, "data": data, "train": {**kept, "steps": steps, "log_every": 1}, "sinks": []}
    with tempfile.TemporaryDirectory() as folder:
        return train(
            probe, out=Path(folder) / "probe", quiet=True, keep_weights=False, handle_signals=False,
            count_flops=steps == 1,
        )  # fmt: skip
