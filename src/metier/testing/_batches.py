"""Synthetic batches for the suite of objectives: of any type, with the fields that an objective declares to need."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from metier.core.batch import Labels, Lists, Pairs, Rated, Rewards, Rollouts, Tokens

N, B, K, C, V = 7, 4, 4, 5, 6
LEAVES = {"logps", "chosen_logps", "rejected_logps", "sampled_logps", "other_logps", "chosen", "rejected", "logits"}
"""Fields that come from the policy and so carry gradient; with scores per token, sums follow from these."""
SAMPLES = 2


def _logps(*shape: int, scale: float = 3.0) -> Tensor:
    return -scale * torch.rand(*shape, dtype=torch.float64) - 0.05


def _tokens(needs: frozenset[str]) -> Tokens:
    ref = _logps(N) if "reference" in needs else None
    batch = Tokens(_logps(N), torch.ones(N, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2, 2]), ref)
    if "logits" not in needs:
        return batch
    logits, targets = torch.randn(N, V, dtype=torch.float64), torch.randint(V, (N,))
    made = from_logits(replace(batch, targets=targets), logits)
    if "reference" not in needs or not any(f.name == "ref_logits" for f in fields(Tokens)):
        return made
    return replace(made, ref_logits=torch.randn(N, V, dtype=torch.float64))


def _pairs(needs: frozenset[str]) -> Pairs:
    known = "reference" in needs
    chosen, rejected = (torch.tensor(v, dtype=torch.float64) for v in ([3, 5, 2, 4], [4, 2, 6, 3]))
    batch = Pairs(
        _logps(B, scale=9.0), _logps(B, scale=9.0), chosen, rejected,
        _logps(B, scale=9.0) if known else None, _logps(B, scale=9.0) if known else None,
        torch.rand(B, dtype=torch.float64),
    )  # fmt: skip
    if "samples" in needs:
        ref = _logps(B, SAMPLES, scale=9.0) if known else None
        length = torch.full((B, SAMPLES), 4.0, dtype=torch.float64)
        batch = replace(
            batch,
            sampled_logps=_logps(B, SAMPLES, scale=9.0),
            sampled_len=length,
            ref_sampled_logps=ref,
        )
    if "tokens" not in needs:
        return batch
    return _with_tokens(batch, torch.stack([batch.chosen_len, batch.rejected_len], 1).flatten(), needs)


def _with_tokens(batch: Any, lengths: Tensor, needs: frozenset[str]) -> Any:
    """Pairs or lists with ``lengths[s]`` tokens in answer s; the sums over answers are sums of these."""
    number = int(lengths.sum())
    known = "reference" in needs
    tokens = Tokens(
        _logps(number), torch.ones(number, dtype=torch.float64), torch.arange(len(lengths)).repeat_interleave(lengths.long()),
        _logps(number) if known else None, collision=_logps(number, scale=2.0) if "collision" in needs else None,
    )  # fmt: skip
    if "logits" in needs:
        logits = torch.randn(2, number, V, dtype=torch.float64)
        tokens = from_logits(replace(tokens, targets=torch.randint(V, (number,))), logits[0])
        tokens = replace(tokens, ref_logits=logits[1] if known else None)
    return _summed(replace(batch, tokens=tokens), tokens)


def _summed(batch: Any, tokens: Tokens) -> Any:
    """The pairs or lists that have these tokens."""
    found = {"logps": _answers(batch, tokens, tokens.logps)}
    if tokens.ref_logps is not None:
        found["ref_logps"] = _answers(batch, tokens, tokens.ref_logps)
    if isinstance(batch, Lists):
        return replace(batch, tokens=tokens, **{n: v.view_as(batch.present) for n, v in found.items()})
    sides = {"logps": ("chosen_logps", "rejected_logps"), "ref_logps": ("ref_chosen_logps", "ref_rejected_logps")}
    return replace(batch, tokens=tokens, **{name: v[k::2] for n, v in found.items() for k, name in enumerate(sides[n])})


def _answers(batch: Any, tokens: Tokens, values: Tensor) -> Tensor:
    """Sums over the tokens of each answer."""
    return values.new_zeros(_number(batch)).index_add(0, tokens.sequence, values)


def _number(batch: Any) -> int:
    """Answers of all units, absent ones included."""
    return batch.present.numel() if isinstance(batch, Lists) else 2 * len(batch.chosen_len)


def _group(batch: Any) -> int:
    """Answers of one unit."""
    return batch.present.shape[1] if isinstance(batch, Lists) else 2


def _rated(needs: frozenset[str]) -> Rated:
    ref = _logps(B, scale=9.0) if "reference" in needs else None
    length = torch.tensor([3.0, 5.0, 2.0, 4.0], dtype=torch.float64)
    batch = Rated(_logps(B, scale=9.0), length, torch.tensor([True, False, True, False]), ref)
    if "mismatch" not in needs:
        return batch
    return replace(batch, other_logps=_logps(B, scale=9.0), ref_other_logps=_logps(B, scale=9.0) if ref is not None else None)


def _lists(needs: frozenset[str]) -> Lists:
    present = torch.tensor([*[[True] * K] * (B - 1), [True] * (K - 1) + [False]])
    ref = _logps(B, K, scale=9.0) * present if "reference" in needs else None
    length = torch.randint(2, 7, (B, K)).double() * present
    batch = Lists(_logps(B, K, scale=9.0) * present, length, torch.randn(B, K, dtype=torch.float64), present, ref)
    return _with_tokens(batch, length.flatten(), needs) if "tokens" in needs else batch


def whole_lists(batch: Lists, needs: frozenset[str]) -> Lists:
    """No answer missing, scores those of a square with ones on its diagonal: for objectives that refuse other lists."""
    full, square = torch.ones_like(batch.present), torch.eye(round(K**0.5), dtype=torch.float64).flatten()
    length = batch.length.clamp(min=2)
    made = replace(batch, present=full, logps=batch.logps - 0.5, length=length, score=square.repeat(B, 1))
    return _with_tokens(made, length.flatten(), needs) if "tokens" in needs else made


def _rewards(needs: frozenset[str]) -> Rewards:
    chosen, rejected = torch.randn(2, B, dtype=torch.float64)
    return Rewards(chosen, rejected, torch.rand(B, dtype=torch.float64))


def _rollouts(needs: frozenset[str]) -> Rollouts:
    logps = _logps(N)
    old = logps + 0.05 * torch.randn(N, dtype=torch.float64)
    ref = _logps(N) if "reference" in needs else None
    return Rollouts(
        logps,
        old,
        torch.tensor([0, 0, 1, 1, 2, 3, 3]),
        torch.tensor([[1.0, 0.0], [0.3, 0.9]], dtype=torch.float64),
        ref,
    )


def _labels(needs: frozenset[str]) -> Labels:
    return Labels(torch.randn(B, C, dtype=torch.float64), torch.tensor([0, 2, 4, 2]))


MAKERS: dict[type, Callable[[frozenset[str]], Any]] = {
    Tokens: _tokens, Pairs: _pairs, Rated: _rated, Lists: _lists, Rewards: _rewards, Rollouts: _rollouts, Labels: _labels,
}  # fmt: skip


def leaves(batch: Any) -> list[str]:
    """Names of the policy's scores; with whole logits the log-probabilities follow from them."""
    present = [f.name for f in fields(batch) if f.name in LEAVES and getattr(batch, f.name) is not None]
    if getattr(batch, "tokens", None) is not None:
        return ["tokens", *(n for n in present if n == "sampled_logps")]
    return ["logits"] if "logits" in present else present


def leaf(batch: Any, name: str) -> Tensor:
    """The scores of that name; of ``tokens`` the logits where there are any."""
    if name != "tokens":
        return getattr(batch, name)
    return batch.tokens.logps if batch.tokens.logits is None else batch.tokens.logits


def from_logits(batch: Tokens, logits: Tensor) -> Tokens:
    """The tokens with these logits and the log-probabilities of their targets."""
    assert batch.targets is not None
    logps = logits.log_softmax(-1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
    return replace(batch, logits=logits, logps=logps)


def with_scores(batch: Any, values: dict[str, Tensor]) -> Any:
    """The batch with other scores of the policy, by the names of :func:`leaves`, and what follows from them."""
    if "logits" in values:
        return from_logits(batch, values["logits"]) if isinstance(batch, Tokens) else replace(batch, **values)
    if "tokens" in values:
        given = values["tokens"]
        batch = _summed(batch, from_logits(batch.tokens, given) if given.ndim == 2 else replace(batch.tokens, logps=given))
    return replace(batch, **{n: v for n, v in values.items() if n != "tokens"})


def alternating(like: Tensor, name: str, size: float) -> Tensor:
    """Scores that are small and of this size in turn."""
    pattern = torch.arange(like.numel()).view(like.shape) % 2
    if name == "rejected_logps":
        pattern = 1 - pattern
    whole = name == "logits" or (name == "tokens" and like.ndim == 2)
    return (pattern * 2 - 1) * size if whole else -(pattern.to(like.dtype) * size) - 1e-3


def permuted(batch: Any, order: Tensor) -> Any:
    """The units in another order."""
    given = {f.name: v for f in fields(batch) if (v := getattr(batch, f.name)) is not None}
    tokens = given.pop("tokens", None)
    if isinstance(batch, Rollouts):
        given.pop("reward")
    moved = replace(batch, **{n: v[order] for n, v in given.items()})
    if tokens is None:
        return moved
    place, group = torch.empty_like(order).scatter(0, order, torch.arange(len(order))), _group(batch)
    sequence = group * place[tokens.sequence // group] + tokens.sequence % group
    by_sequence = torch.argsort(sequence, stable=True)
    return replace(moved, tokens=mapped(replace(tokens, sequence=sequence), lambda v: v[by_sequence]))


def mapped(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """``f`` of every tensor."""
    given = {x.name: v for x in fields(batch) if (v := getattr(batch, x.name)) is not None}
    return replace(batch, **{n: f(v) if isinstance(v, Tensor) else mapped(v, f) for n, v in given.items()})
