"""What preference objectives share: log-ratios to the reference, token means, and the metrics they all report."""

import math

import torch
from torch import Tensor

from metier.core.batch import Lists, Pairs, Rated


def log_ratios(b: Pairs) -> tuple[Tensor, Tensor]:
    """``log π/π_ref`` of the chosen and of the rejected answers, ``[B]`` each, summed over tokens."""
    assert b.ref_chosen_logps is not None, "the objective declares needs=('reference',)"
    assert b.ref_rejected_logps is not None
    return b.chosen_logps - b.ref_chosen_logps, b.rejected_logps - b.ref_rejected_logps


def means(b: Pairs) -> tuple[Tensor, Tensor]:
    """Mean log-probability per token of the chosen and of the rejected answers, ``[B]`` each; an empty answer has 0."""
    return b.chosen_logps / b.chosen_len.clamp(min=1), b.rejected_logps / b.rejected_len.clamp(min=1)


def log_ratio(b: Rated | Lists) -> Tensor:
    """``log π/π_ref`` of single or listed answers, summed over tokens: ``[B]`` or ``[B, K]``."""
    assert b.ref_logps is not None, "the objective declares needs=('reference',)"
    return b.logps - b.ref_logps


def mean(b: Rated | Lists) -> Tensor:
    """Mean log-probability per token of single or listed answers: ``[B]`` or ``[B, K]``."""
    return b.logps / b.length.clamp(min=1)


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Implicit rewards of both answers, their margin, and how often the order is right (a tie counts one half)."""
    chosen, rejected = chosen.detach(), rejected.detach()
    margin = chosen - rejected
    right = (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
    return {"chosen_reward": chosen, "rejected_reward": rejected, "margin": margin, "accuracy": right}


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0`` without cancellation (Mächler 2012); ``x`` is kept below ``-1e-6``."""
    x = x.clamp(max=-1e-6)
    near = x > -math.log(2)
    # each branch sees only its own values, so that neither sends a NaN into the gradient of the other
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )


def log_odds(mean_logp: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``p = exp(mean_logp)``."""
    return mean_logp.clamp(max=-1e-6) - log1mexp(mean_logp)


# --- single and listed answers -------------------------------------------------------------------------------


def rated_metrics(reward: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Of each single answer: its reward ``[B]`` and whether the reward's sign agrees with the label (0 counts one half)."""
    reward = reward.detach()
    toward = torch.where(label, reward, -reward)
    return {"reward": reward, "accuracy": _half_ties(toward)}


def class_means(reward: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Mean reward of the desirable and of the undesirable answers of a whole step, and the difference; 0 for a class without
    answers. Numbers of the step: only for objectives that see all of it (``needs=("batch",)``)."""
    reward, yes = reward.detach(), label.to(reward.dtype)
    chosen = (reward * yes).sum() / yes.sum().clamp(min=1)
    rejected = (reward * (1 - yes)).sum() / (1 - yes).sum().clamp(min=1)
    return {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected}


def better(b: Lists) -> Tensor:
    """``[B, K, K]`` bool: both answers exist and the first scores strictly higher than the second (a tie says nothing)."""
    both = b.present.unsqueeze(2) & b.present.unsqueeze(1)
    return both & (b.score.unsqueeze(2) > b.score.unsqueeze(1))


def log_softmax(x: Tensor, present: Tensor) -> Tensor:
    """Log-softmax over the answers that exist, ``[B, K]``; 0 for those that do not."""
    low = torch.finfo(x.dtype).min  # finite, so that a list without any answer gives no NaN
    return torch.log_softmax(x.masked_fill(~present, low), dim=-1).masked_fill(~present, 0.0)


def softmax(x: Tensor, present: Tensor) -> Tensor:
    """Softmax over the answers that exist, ``[B, K]``; 0 for those that do not."""
    return log_softmax(x, present).exp() * present


def average(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values [B, K]`` where ``mask`` holds, ``[B]``; 0 where it holds nowhere."""
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def best(b: Lists) -> Tensor:
    """``[B, K]`` bool: no answer of the list scores higher. Several when they tie."""
    return b.present & ~better(b).any(1)


def worst(b: Lists) -> Tensor:
    """``[B, K]`` bool: no answer of the list scores lower."""
    return b.present & ~better(b).any(2)


def list_metrics(reward: Tensor, b: Lists) -> dict[str, Tensor]:
    """``reward_metrics`` of lists: rewards of the best and of the worst answers (averaged over ties) and their difference;
    accuracy is the share of ordered pairs whose rewards have the right order, one half where nothing is ordered."""
    reward, order = reward.detach(), better(b)
    right = _half_ties(reward.unsqueeze(2) - reward.unsqueeze(1)).masked_fill(~order, 0.0).sum((1, 2))
    pairs = order.sum((1, 2))
    accuracy = torch.where(pairs > 0, right / pairs.clamp(min=1), 0.5)
    chosen, rejected = average(reward, best(b)), average(reward, worst(b))
    return {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected, "accuracy": accuracy}


def _half_ties(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype) + 0.5 * (x == 0).to(x.dtype)
