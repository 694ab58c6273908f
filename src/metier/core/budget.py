"""Equal budgets: a run's length from tokens, FLOPs or seconds.

FLOPs are those of matrix products and attention in one real step, counted by ``torch.utils.flop_counter``;
seconds come from timing a few steps. Both probe with the run's own first batch and leave no trace.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from metier.core.api import Result, train

PROBE_STEPS = 6


def apply_budget(run: Mapping[str, Any], budget: Mapping[str, float]) -> dict[str, Any]:
    """The run file with its length set so that it spends the budget (``{"tokens": …}`` or flops, seconds)."""
    changed = {**run, "train": dict(run.get("train", {}))}
    if not budget:
        return changed
    ((kind, amount),) = budget.items()
    for key in ("steps", "epochs", "tokens"):
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
    probe = {**run, "train": {**run.get("train", {}), "steps": steps}}
    probe["train"].pop("eval_every", None)
    with tempfile.TemporaryDirectory() as folder:
        data = {**run["data"], "eval": None, "eval_fraction": 0.0}
        return train(
            {**probe, "data": data}, out=Path(folder) / "probe", quiet=True, keep_weights=False, handle_signals=False,
            count_flops=steps == 1,
        )  # fmt: skip
