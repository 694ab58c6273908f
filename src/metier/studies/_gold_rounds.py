"""Gold reward before and after a round of DPO on a model's own answers, by who labels them, with standard errors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core.models import Bundle
from metier.lab import preferencebench, words
from metier.studies._reward_models import standard_error


def rounds(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean gold reward before and after the round, and the lead of EXRM's labels with its standard error over seeds."""
    gold = {arm: float(np.mean([r["gold"][arm]["gold_reward"] for r in runs])) for arm in ("start", "exrm", "dporm")}
    leads = [r["gold"]["exrm"]["gold_reward"] - r["gold"]["dporm"]["gold_reward"] for r in runs]
    return gold, {"seeds": leads, "mean": float(np.mean(leads)), "error": standard_error(leads)}


def told(study: Study, bundle: Bundle) -> dict[str, float]:
    """Gold reward of 512 answers and its standard error, prompts as clusters."""
    samples = 16 if study.quick else 512
    found = preferencebench.measure(bundle, None, words.prompts(128, "measured", split="held-out")[:samples], samples=samples)
    return {k: found[k] for k in ("gold_reward", "gold_se")}
