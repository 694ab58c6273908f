"""Scores of a layout's targets as the typed batch that an objective reads."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from metier.core.batch import Batch, Lists, Pairs, Rated, Rewards, Rollouts, Tokens
from metier.core.layout import Layout


def assemble(layout: Layout, tokens: Tokens, kind: type, needs: frozenset[str]) -> Batch:
    """``tokens`` (one entry per target) summed per answer and arranged as ``kind``."""
    return tokens if kind is Tokens else _MAKERS[kind](layout, tokens, needs)


def _sums(layout: Layout, values: Tensor | None) -> Tensor | None:
    """Sums ``[S]`` over the targets of each answer; values that are already per answer pass through."""
    answers = sum(layout.answers)
    if values is None or (values.shape[0] == answers and values.shape != layout.target.shape):
        return values
    return values.new_zeros(answers).index_add(0, layout.sequence, values)


def _summed(layout: Layout, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per answer ``[S]``: log-probability, number of targets, log-probability under the reference."""
    sums = _sums(layout, tokens.logps)
    assert sums is not None
    lengths = torch.bincount(layout.sequence, minlength=sum(layout.answers)).to(sums.dtype)
    return sums, lengths, _sums(layout, tokens.ref_logps)


def _starts(layout: Layout) -> Tensor:
    """Index of the first answer of each example."""
    answers = torch.tensor(layout.answers, dtype=torch.int64, device=layout.target.device)
    return torch.cumsum(answers, 0) - answers


def _pick(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values[index]


def _pairs(layout: Layout, tokens: Tokens, needs: frozenset[str]) -> Pairs:
    """The first two answers of each example are chosen and rejected; all others are samples."""
    sums, lengths, ref = _summed(layout, tokens)
    chosen = _starts(layout)
    rejected = chosen + 1
    samples: dict[str, Tensor | None] = {}
    if "samples" in needs:
        index = chosen.unsqueeze(1) + torch.arange(2, min(layout.answers), device=chosen.device)
        samples = {
            "sampled_logps": sums[index],
            "sampled_len": lengths[index],
            "ref_sampled_logps": _pick(ref, index),
        }
    return Pairs(
        sums[chosen], sums[rejected], lengths[chosen], lengths[rejected], _pick(ref, chosen), _pick(ref, rejected), layout.label,
        tokens=_paired_tokens(layout, tokens, chosen) if "tokens" in needs else None, **samples,
    )  # fmt: skip


def _paired_tokens(layout: Layout, tokens: Tokens, chosen: Tensor) -> Tokens:
    """The tokens of chosen and rejected answers, numbered ``2i`` and ``2i + 1``."""
    number = torch.full((sum(layout.answers),), -1, dtype=torch.int64, device=chosen.device)
    pairs = torch.arange(len(chosen), device=chosen.device)
    number[chosen], number[chosen + 1] = 2 * pairs, 2 * pairs + 1
    sequence = number[layout.sequence]
    kept = sequence >= 0
    return Tokens(
        tokens.logps[kept], tokens.weights[kept], sequence[kept],
        *(_pick(v, kept) for v in (tokens.ref_logps, tokens.logits, tokens.targets, tokens.ref_logits, tokens.collision)),
    )  # fmt: skip


def _rated(layout: Layout, tokens: Tokens, needs: frozenset[str]) -> Rated:
    """The first answer of each example is rated; with ``mismatch`` the second one belongs to another prompt."""
    assert layout.label is not None
    sums, lengths, ref = _summed(layout, tokens)
    own = _starts(layout)
    other = own + 1 if "mismatch" in needs else None
    return Rated(
        sums[own], lengths[own], layout.label.bool(), _pick(ref, own),
        None if other is None else sums[other], None if other is None else _pick(ref, other),
    )  # fmt: skip


def _lists(layout: Layout, tokens: Tokens, needs: frozenset[str]) -> Lists:
    """Ragged lists become ``[B, K]`` with absent answers at zero."""
    assert layout.label is not None
    sums, lengths, ref = _summed(layout, tokens)
    answers = torch.tensor(layout.answers, device=sums.device)
    present = torch.arange(layout.label.shape[1], device=sums.device) < answers.unsqueeze(1)

    def spread(flat: Tensor) -> Tensor:
        return flat.new_zeros(present.shape).masked_scatter(present, flat)

    return Lists(
        spread(sums), spread(lengths), layout.label, present, None if ref is None else spread(ref),
        replace(tokens, sequence=present.flatten().nonzero().squeeze(1)[layout.sequence]) if "tokens" in needs else None,
    )  # fmt: skip


def rewards(layout: Layout, values: Tensor) -> Rewards:
    """A reward model's scores ``[S]`` of all answers as pairs."""
    chosen = _starts(layout)
    return Rewards(values[chosen], values[chosen + 1], layout.label)


def _rollouts(layout: Layout, tokens: Tokens, needs: frozenset[str]) -> Rollouts:
    assert layout.label is not None
    old = tokens.logps.detach() if layout.old_logps is None else layout.old_logps
    return Rollouts(tokens.logps, old, layout.sequence, layout.label, tokens.ref_logps)


_MAKERS: dict[type, Callable[[Layout, Tokens, frozenset[str]], Batch]] = {
    Pairs: _pairs, Rated: _rated, Lists: _lists, Rollouts: _rollouts,
}  # fmt: skip
