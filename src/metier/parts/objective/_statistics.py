"""Sums and means over answers' tokens and samples, and running moments of a batch statistic."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.batch import Pairs, Tokens


def pair_tokens(b: Pairs) -> Tokens:
    """The pairs' tokens, which the objective declares to need."""
    assert b.tokens is not None, "the objective declares needs=('tokens',)"
    return b.tokens


def per_answer(values: Tensor, sequence: Tensor, answers: int) -> Tensor:
    """Sums ``[answers]`` of ``values`` ``[N]`` over each answer's tokens."""
    return torch.zeros(answers, dtype=values.dtype, device=values.device).index_add(0, sequence.long(), values)


def place(sequence: Tensor) -> Tensor:
    """``[N]`` place of each token within its own answer, from 0, whatever the order of the answers."""
    order = torch.argsort(sequence, stable=True)
    counts = torch.bincount(sequence.long())
    begin = counts.cumsum(0) - counts
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=order.device) - begin[sequence.long()[order]]
    return found


def sampled_mean(values: Tensor | None, length: Tensor | None) -> Tensor:
    """Mean ``[B]`` over the samples ``[B, S]`` that exist, which are those with tokens."""
    assert values is not None, "the objective declares needs=('samples',)"
    there = torch.ones_like(values) if length is None else (length > 0).to(values.dtype)
    return (values * there).sum(1) / there.sum(1).clamp(min=1)


@dataclass
class Running:
    """Exponential averages of the mean and of the standard deviation of batches, from 0.

    ``corrected`` divides by the weight that the batches seen so far have, ``1 - decay^count`` (as Adam does).
    """

    decay: float
    corrected: bool
    mean_sum: float = 0.0
    std_sum: float = 0.0
    count: int = 0

    def update(self, values: Tensor) -> None:
        """Take in a batch ``[B]``; one of fewer than two values has no standard deviation and is left out."""
        if values.numel() < 2:
            return
        wide = values.detach().double()
        self.mean_sum = self.decay * self.mean_sum + (1 - self.decay) * float(wide.mean())
        self.std_sum = self.decay * self.std_sum + (1 - self.decay) * float(wide.std())
        self.count += 1

    @property
    def mean(self) -> float:
        """The running mean; 0 before any batch."""
        return self.mean_sum / self._weight

    @property
    def std(self) -> float:
        """The running standard deviation (with ``n - 1``); 0 before any batch."""
        return self.std_sum / self._weight

    @property
    def _weight(self) -> float:
        return 1 - self.decay**self.count if self.corrected and self.count else 1.0

    def state_dict(self) -> dict[str, float]:
        """Sums and count."""
        return {"mean_sum": self.mean_sum, "std_sum": self.std_sum, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up where ``state_dict`` was made."""
        self.mean_sum, self.std_sum, self.count = state["mean_sum"], state["std_sum"], int(state["count"])
