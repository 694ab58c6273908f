"""Length as a reward: for experiments on length bias."""

from typing import Literal

import torch
from torch import Tensor

from metier.core.part import Index, NonNegative, part


@part("reward/length", paper="arXiv:2310.03716 (length as the only reward; the formula is ours)")
def length(
    prompts: list[str],
    completions: list[list[str]],
    answers: list[str] | None,
    *,
    target: Index | None = None,
    scale: NonNegative = 1.0,
    unit: Literal["words", "characters"] = "words",
) -> Tensor:
    """``-scale · |n - target|`` of a completion with n words (separated by blanks) or characters; without target ``scale · n``.

    ``[P, K]``; missing completions of shorter rows count as empty.
    """
    rewards = torch.zeros(len(prompts), max(map(len, completions), default=0))
    for row, written in zip(rewards, completions, strict=True):
        for k in range(len(row)):
            text = written[k] if k < len(written) else ""
            n = len(text.split()) if unit == "words" else len(text)
            row[k] = scale * n if target is None else -scale * abs(n - target)
    return rewards
