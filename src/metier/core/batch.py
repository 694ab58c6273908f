"""What objectives read: typed batches of scores.

Letters in shapes: B sequences, pairs or prompts; K answers to one prompt; N positions that carry loss in the whole
batch; C classes. Log-probabilities are natural logarithms. Everything is a tensor on one device.
The first parameter of an objective is annotated with one of these types; the core scores the batch accordingly.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Positions that carry loss, flattened over the batch. The loss unit is one token."""

    logps: Tensor
    """``[N]`` log-probability of each target token."""
    weights: Tensor
    """``[N]`` weight of each target, 1 unless the data say otherwise."""
    sequence: Tensor
    """``[N]`` index of the sequence that a position belongs to."""
    ref_logps: Tensor | None = None
    """``[N]`` the same under the reference model, with ``needs=("reference",)``."""
    logits: Tensor | None = None
    """``[N, V]``, only with ``needs=("logits",)``."""
    targets: Tensor | None = None
    """``[N]`` target token ids, only with ``needs=("logits",)``."""
    ref_logits: Tensor | None = None
    """``[N, V]`` under the reference model, with ``needs=("logits", "reference")``."""
    collision: Tensor | None = None
    """``[N]`` ``log Σ_v p(v)²`` of the predicting distribution, without gradient, with ``needs=("collision",)``."""


@dataclass(frozen=True)
class Pairs:
    """A preferred and a rejected answer to the same prompt. The loss unit is one pair."""

    chosen_logps: Tensor
    """``[B]`` summed over the answer's tokens."""
    rejected_logps: Tensor
    chosen_len: Tensor
    """``[B]`` number of answer tokens that carry loss, as floats."""
    rejected_len: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    margin: Tensor | None = None
    """``[B]`` difference of given scores where the data have them."""
    sampled_logps: Tensor | None = None
    """``[B, S]`` summed over the tokens of further answers, sampled from the reference, with ``needs=("samples",)``."""
    sampled_len: Tensor | None = None
    ref_sampled_logps: Tensor | None = None
    tokens: Tokens | None = None
    """Every target token, with ``needs=("tokens",)``: sequence ``2i`` is the chosen answer of pair i, ``2i + 1`` the
    rejected one (samples are left out); in the order of the text. The sums above are sums of these."""


@dataclass(frozen=True)
class Rated:
    """Single answers marked desirable or not. The loss unit is one answer."""

    logps: Tensor
    length: Tensor
    label: Tensor
    """``[B]`` bool: desirable."""
    ref_logps: Tensor | None = None
    other_logps: Tensor | None = None
    """``[B]`` of an answer that belongs to another prompt, with ``needs=("mismatch",)``."""
    ref_other_logps: Tensor | None = None


@dataclass(frozen=True)
class Lists:
    """K answers to one prompt with scores. The loss unit is one prompt."""

    logps: Tensor
    """``[B, K]``."""
    length: Tensor
    score: Tensor
    """``[B, K]`` higher is better."""
    present: Tensor
    """``[B, K]`` bool: the answer exists (lists may be ragged)."""
    ref_logps: Tensor | None = None
    tokens: Tokens | None = None
    """Every target token, with ``needs=("tokens",)``: sequence ``i K + k`` is answer k of list i."""


@dataclass(frozen=True)
class Rewards:
    """Scores that a reward model gives to a preferred and a rejected answer. The loss unit is one pair."""

    chosen: Tensor
    """``[B]``."""
    rejected: Tensor
    margin: Tensor | None = None
    """``[B]`` difference of given scores where the data have them."""


@dataclass(frozen=True)
class Rollouts:
    """Answers sampled from the policy, with rewards. The loss unit is one answer token."""

    logps: Tensor
    """``[N]`` under the current policy."""
    old_logps: Tensor
    """``[N]`` under the policy that sampled."""
    sequence: Tensor
    """``[N]`` index of the answer, in ``0 … P*K-1``."""
    reward: Tensor
    """``[P, K]``."""
    ref_logps: Tensor | None = None


@dataclass(frozen=True)
class Labels:
    """Sequence classification. The loss unit is one example."""

    logits: Tensor
    """``[B, C]``."""
    label: Tensor
    """``[B]`` class index."""


Batch = Tokens | Pairs | Rated | Lists | Rewards | Rollouts | Labels
