"""The tabular bench: policies that are tables, preferences that are exact, optima that are known.

X prompts with K answers each; a policy is the softmax of a free table ``[X, K]``. The population loss of an objective part is
its loss on every ordered pair (or list, or rated answer), weighted by how often the data would hold it: no sampling noise.

    bench = random_bench(prompts=8, answers=5, seed=0)              # reference, gold reward, exact Bradley-Terry preferences
    fit = minimise({"dpo": {"beta": 0.5}}, bench)                   # L-BFGS in float64; also "adam", "gd"
    total_variation(fit.policy, bench.optimum(0.5)).max()           # < 1e-6
    population_loss("ipo", table, bench, weights=bench.weights(flip=0.3))
    bench.expected_reward(p), bench.regret(p), kl(p, bench.reference), win_rate(p, q, bench.preference)

``fit.policy`` and ``bench.reference`` are log-probabilities ``[X, K]``. Another ``preference`` matrix (a cycle, say) is put
in with ``dataclasses.replace(bench, preference=…)``; ``bench.sampled(1000, seed)`` are weights counted from sampled labels
instead of exact ones. Everything is float64 on the CPU and takes seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import isfunction
from typing import Any, Literal

import torch
from torch import Tensor

from metier.core.batch import Batch, Lists, Pairs, Rated, Rewards, Tokens
from metier.core.errors import UsageError
from metier.core.part import Built, build

Objective = str | Mapping[str, Any] | Built | Callable[..., Any]
"""A part's reference or the built part; or a plain function annotated like one, which is given the reference too."""
Method = Literal["lbfgs", "adam", "gd"]
DRAWS = 256
"""Answers that stand for samples of the reference."""


@dataclass(frozen=True)
class Bench:
    """A world of X prompts and K answers; every prompt is equally frequent."""

    reference: Tensor
    """``[X, K]`` log-probabilities of μ."""
    gold: Tensor
    """``[X, K]`` gold reward r*."""
    preference: Tensor
    """``[X, K, K]`` probability that the first answer is preferred to the second; Bradley-Terry unless replaced."""
    length: Tensor
    """``[X, K]`` token counts that objectives with length terms see."""

    def weights(self, *, flip: float = 0.0, sampling: Literal["uniform", "reference"] = "uniform") -> Tensor:
        """``[X, K, K]``, sum 1: how often the data hold "first chosen, second rejected".

        Pairs of different answers are drawn uniformly or from μ (independently, equal ones left out); labels are flipped with
        ``flip``.
        """
        p = self.reference.exp() if sampling == "reference" else torch.ones_like(self.reference)
        drawn = p[:, :, None] * p[:, None, :] * (1 - torch.eye(p.shape[1], dtype=p.dtype))
        drawn = drawn / drawn.sum((1, 2), keepdim=True) / len(p)
        return 2 * drawn * ((1 - flip) * self.preference + flip * self.preference.transpose(1, 2))

    def sampled(self, number: int, seed: int = 0, **how: Any) -> Tensor:
        """``weights`` as counted in ``number`` labelled pairs drawn from them."""
        weights = self.weights(**how)
        drawn = torch.multinomial(weights.flatten(), number, replacement=True, generator=torch.Generator().manual_seed(seed))
        return torch.bincount(drawn, minlength=weights.numel()).to(weights.dtype).view_as(weights) / number

    def optimum(self, beta: float) -> Tensor:
        """Log-probabilities of ``μ exp(r*/β) / Z``, the maximiser of reward minus β KL."""
        return (self.reference + self.gold / beta).log_softmax(1)

    def expected_reward(self, policy: Tensor) -> float:
        """Mean gold reward of a policy (log-probabilities)."""
        return float((policy.exp() * self.gold).sum(1).mean())

    def regret(self, policy: Tensor, beta: float | None = None) -> float:
        """How much less the policy has than the best: of the reward, or with ``beta`` of reward minus β KL to μ."""
        if beta is None:
            return float(self.gold.max(1).values.mean()) - self.expected_reward(policy)
        return beta * float(kl(policy, self.optimum(beta)).mean())


def bradley_terry(reward: Tensor, temperature: float = 1.0) -> Tensor:
    """``[X, K, K]``: ``σ((r_i - r_j) / temperature)``."""
    return torch.sigmoid((reward[:, :, None] - reward[:, None, :]) / temperature)


def random_bench(
    prompts: int = 8, answers: int = 5, seed: int = 0, *, spread: float = 1.0, reward_sd: float = 1.0, longest: int = 1
) -> Bench:
    """Normal logits of μ with sd ``spread``, normal rewards, lengths uniform in 1 … ``longest``."""
    g = torch.Generator().manual_seed(seed)
    logits, gold = (s * torch.randn(prompts, answers, generator=g, dtype=torch.float64) for s in (spread, reward_sd))
    length = torch.randint(1, longest + 1, (prompts, answers), generator=g).double()
    return Bench(logits.log_softmax(1), gold, bradley_terry(gold), length)


# --- the loss --------------------------------------------------------------------------------------------------------


def population_loss(objective: Objective, table: Tensor, bench: Bench, weights: Tensor | None = None) -> Tensor:
    """The objective's expected loss for the policy ``softmax(table)``; differentiable in ``table [X, K]``.

    Pair losses see all ``X K (K-1)`` ordered pairs with ``weights`` (default ``bench.weights()``); losses on rated answers see
    each answer as desirable as often as it is chosen, and as undesirable as often as it is rejected; list losses see each
    prompt's K answers with their gold rewards; reward models see ``table`` as their rewards. Given score margins are those of
    the gold reward, so half of them are negative. Where asked for, an answer is one token; samples of the reference are the
    answers at ``DRAWS`` even quantiles of μ; the answer of another prompt is the next one in the table. Statistics over a
    whole batch are taken without the weights.

    Raises ``UsageError`` for objectives that need what a table does not have.
    """
    return _loss(*_resolved(objective), table, bench, weights)[0]


def _loss(obj: Any, reads: type, needs: frozenset[str], table: Tensor, bench: Bench, weights: Tensor | None) -> Any:
    batch, mass = _batch(reads, needs, table, bench, bench.weights() if weights is None else weights)
    result = obj(batch)
    return ((result[0] if isinstance(result, tuple) else result) * mass).sum(), batch


def _resolved(objective: Objective) -> tuple[Any, type, frozenset[str]]:
    from metier.core.lossmodule import batch_type

    if isinstance(objective, str | Mapping):
        objective = build("objective", objective)
    if isinstance(objective, Built):
        return objective.obj, batch_type(objective.obj), objective.needs
    reads = batch_type(partial(objective) if isfunction(objective) and not hasattr(objective, "reads") else objective)
    return objective, reads, frozenset(getattr(objective, "needs", ("reference",)))


def _batch(reads: type, needs: frozenset[str], table: Tensor, bench: Bench, weights: Tensor) -> tuple[Batch, Tensor]:
    """A batch of every unit there is, and the mass of each."""
    if missing := needs & {"logits", "closure"}:
        raise UsageError(f"the tabular bench has no {', '.join(sorted(missing))}")
    makers = {Pairs: _pairs, Rated: _rated, Lists: _lists, Rewards: _rewards}
    if reads not in makers:
        raise UsageError(f"the tabular bench has no {reads.__name__}: it is about preferences")
    return makers[reads](needs, table, bench, weights)


def _pairs(needs: frozenset[str], table: Tensor, bench: Bench, weights: Tensor) -> tuple[Pairs, Tensor]:
    logp = table.log_softmax(1)
    x, i, j = _places(bench)
    ref = bench.reference if "reference" in needs else None
    tokens = _tokens(logp, ref, x, i, j) if "tokens" in needs else None
    pairs = Pairs(
        logp[x, i], logp[x, j], bench.length[x, i], bench.length[x, j], None if ref is None else ref[x, i],
        None if ref is None else ref[x, j], bench.gold[x, i] - bench.gold[x, j], tokens=tokens,
        **(_samples(logp, ref, x, bench) if "samples" in needs else {}),
    )  # fmt: skip
    return pairs, weights[x, i, j]


def _samples(logp: Tensor, ref: Tensor | None, x: Tensor, bench: Bench) -> dict[str, Tensor | None]:
    """The same for every pair of a prompt: answers at even quantiles of μ."""
    at = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    mass = bench.reference.exp().cumsum(1)
    drawn = torch.searchsorted(mass / mass[:, -1:], at.expand(len(mass), -1).contiguous())
    picked = [None if v is None else v.gather(1, drawn)[x] for v in (logp, bench.length, ref)]
    return dict(zip(("sampled_logps", "sampled_len", "ref_sampled_logps"), picked, strict=True))


def _places(bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt, chosen and rejected answer of every ordered pair."""
    prompts, answers = bench.gold.shape
    different = ~torch.eye(answers, dtype=torch.bool)
    x, i, j = different.expand(prompts, -1, -1).nonzero(as_tuple=True)
    return x, i, j


def _tokens(logp: Tensor, ref: Tensor | None, x: Tensor, i: Tensor, j: Tensor) -> Tokens:
    """Each answer as one token of a vocabulary of K."""
    prompt, answer = x.repeat_interleave(2), torch.stack([i, j], 1).flatten()
    own = logp[prompt, answer]
    collision = (2 * logp).logsumexp(1).detach()[prompt]
    reference = None if ref is None else ref[prompt, answer]
    return Tokens(own, torch.ones_like(own), torch.arange(len(own)), reference, collision=collision)


def _rated(needs: frozenset[str], table: Tensor, bench: Bench, weights: Tensor) -> tuple[Rated, Tensor]:
    own, ref = table.log_softmax(1), bench.reference
    logp, ref_logp, length, other, ref_other = (
        v.flatten().repeat(2) for v in (own, ref, bench.length, own.roll(-1, 1), ref.roll(-1, 1))
    )
    label = torch.arange(len(logp)) < len(logp) // 2
    mass = torch.cat([weights.sum(2).flatten(), weights.sum(1).flatten()]) / 2
    known, mismatch = "reference" in needs, "mismatch" in needs
    rated = Rated(
        logp, length, label, ref_logp if known else None, other if mismatch else None,
        ref_other if known and mismatch else None,
    )  # fmt: skip
    return rated, mass


def _lists(needs: frozenset[str], table: Tensor, bench: Bench, weights: Tensor) -> tuple[Lists, Tensor]:
    ref = bench.reference if "reference" in needs else None
    logp = table.log_softmax(1)
    return Lists(logp, bench.length, bench.gold, torch.ones_like(logp, dtype=torch.bool), ref), weights.sum((1, 2))


def _rewards(needs: frozenset[str], table: Tensor, bench: Bench, weights: Tensor) -> tuple[Rewards, Tensor]:
    x, i, j = _places(bench)
    return Rewards(table[x, i], table[x, j], bench.gold[x, i] - bench.gold[x, j]), weights[x, i, j]


# --- minimising it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Where a minimisation ended."""

    table: Tensor
    """``[X, K]``."""
    loss: float
    slope: float
    """Largest absolute entry of the gradient."""
    path: tuple[Tensor, ...] = ()
    """Policies on the way, log-probabilities, when asked for; the start is the first."""

    @property
    def policy(self) -> Tensor:
        """``[X, K]`` log-probabilities."""
        return self.table.log_softmax(1)


def minimise(
    objective: Objective, bench: Bench, *, weights: Tensor | None = None, method: Method = "lbfgs", steps: int = 500,
    lr: float | None = None, start: Tensor | None = None, every: int = 0,
) -> Fit:  # fmt: skip
    """Minimise the population loss from ``start`` (default: the reference), full batch.

    ``lr`` is 1 for L-BFGS, 0.05 for Adam, and for gradient descent (``gd``) the number of prompts, since each has only that
    share of the loss. L-BFGS stops when nothing changes any more; it wants losses without state and with a minimum.
    ``every`` > 0 keeps the policy each that many steps (not with L-BFGS). Objectives with state observe each step.
    """
    obj, reads, needs = _resolved(objective)
    table = (bench.reference if start is None else start).detach().clone().requires_grad_()
    weights = bench.weights() if weights is None else weights

    def loss() -> Tensor:
        table.grad = None
        total, batch = _loss(obj, reads, needs, table, bench, weights)
        total.backward()
        if hasattr(obj, "observe"):
            obj.observe(_detached(batch))
        return total

    path = _descend(table, loss, method, steps, lr, len(bench.gold), every)
    total = loss()
    assert table.grad is not None
    return Fit(table.detach().clone(), float(total.detach()), float(table.grad.abs().max()), tuple(path))


def _descend(
    table: Tensor, loss: Callable[[], Tensor], method: Method, steps: int, lr: float | None, prompts: int, every: int
) -> list[Tensor]:
    if method == "lbfgs":
        torch.optim.LBFGS(
            [table], lr or 1.0, max_iter=steps, max_eval=4 * steps, history_size=50, line_search_fn="strong_wolfe",
            tolerance_grad=1e-12, tolerance_change=1e-16,
        ).step(loss)  # fmt: skip
        return []
    optimizer = torch.optim.Adam([table], lr or 0.05) if method == "adam" else torch.optim.SGD([table], lr or float(prompts))
    path = [table.detach().log_softmax(1)] if every else []
    for step in range(1, steps + 1):
        optimizer.step(loss)
        if every and step % every == 0:
            path.append(table.detach().log_softmax(1))
    return path


def _detached(batch: Any) -> Any:
    from dataclasses import fields, is_dataclass, replace

    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {k: _detached(v) if is_dataclass(v) else v.detach() for k, v in values.items() if v is not None}
    return replace(batch, **moved)


# --- comparing policies ----------------------------------------------------------------------------------------------


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """``[X]``: half the summed distance of two policies (log-probabilities ``[X, K]``)."""
    return (p.exp() - q.exp()).abs().sum(1) / 2


def kl(p: Tensor, q: Tensor) -> Tensor:
    """``[X]``: ``KL(p ‖ q)`` of log-probabilities ``[X, K]``; an answer that p never gives adds nothing."""
    mass = p.exp()
    return torch.where(mass > 0, mass * (p - q), torch.zeros_like(mass)).sum(1)


def win_rate(p: Tensor, q: Tensor, preference: Tensor) -> Tensor:
    """``[X]``: probability that an answer of p is preferred to one of q."""
    return torch.einsum("xi,xij,xj->x", p.exp(), preference, q.exp())
