"""What every objective must do: right shape, right gradient, finite everywhere, indifferent to the order of
the batch.

The batch is synthetic, of the type that the objective reads, with the fields it declares to need and no
others. An objective that detaches on purpose (a baseline, a weight) cannot agree with finite differences: for
a part whose source says ``detach`` or ``no_grad`` the gradient is only checked to be finite, and its oracle
test must compare it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from metier.core import part
from metier.core.batch import Labels, Lists, Pairs, Rated, Rewards, Rollouts, Tokens
from metier.core.errors import UsageError
from metier.core.lossmodule import batch_type, scores_again
from metier.testing._sample import sample
from metier.testing._tiny import layout

N, B, K, C, V = 7, 4, 4, 5, 6
WIDTH = 2
LEAVES = {"logps", "chosen_logps", "rejected_logps", "sampled_logps", "other_logps", "chosen", "rejected", "logits"}
"""Fields that come from the policy and so carry gradient; with scores per token, sums follow from these."""
SAMPLES = 2


def check(id: str) -> list[str]:
    """Run the suite on the objective ``id``. Returns the names of the checks; raises ``AssertionError``."""
    case = _case(id)
    loss, metrics = case.run(case.batch())
    _shape(id, case, loss, metrics)
    gradient = _gradient(id, case)
    _finite_at_extremes(id, case)
    _permutation(id, case)
    _inputs_unchanged(id, case)
    return ["shape", gradient, "finite at extremes", "order of the batch", "inputs unchanged"]


@dataclass(frozen=True)
class Case:
    """An objective with what it takes to call it."""

    obj: Any
    reads: type
    needs: frozenset[str]

    @property
    def units(self) -> int:
        """Number of loss units of the synthetic batch."""
        return N if self.reads in (Tokens, Rollouts) else B

    def batch(self, extreme: float | None = None) -> Any:
        """A float64 batch; with ``extreme``, policy scores alternate between 0 and this size."""
        torch.manual_seed(0)
        made = MAKERS[self.reads](self.needs)
        if self.reads is Lists and _refuses(self.obj, made):
            made = _whole_lists(made)
        if extreme is None:
            return made
        return _with(made, {n: _alternating(_leaf(made, n), n, extreme) for n in _leaves(made)})

    def run(self, batch: Any, *, noise: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch, the same at every call. ``noise``: let ``embed`` change the scores."""
        torch.manual_seed(1)
        result = self.obj(_forward(batch, noise), _rows(batch)) if scores_again(self.obj) else self.obj(batch)
        return result if isinstance(result, tuple) else (result, {})


def _case(id: str) -> Case:
    built = sample(id)
    return Case(built.obj, batch_type(built.obj), frozenset(getattr(built.obj, "needs", built.card.needs)))


# --- synthetic batches -------------------------------------------------------------------------------------


def _logps(*shape: int, scale: float = 3.0) -> Tensor:
    return -scale * torch.rand(*shape, dtype=torch.float64) - 0.05


def _tokens(needs: frozenset[str]) -> Tokens:
    ref = _logps(N) if "reference" in needs else None
    batch = Tokens(_logps(N), torch.ones(N, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2, 2]), ref)
    if "logits" not in needs:
        return batch
    logits, targets = torch.randn(N, V, dtype=torch.float64), torch.randint(V, (N,))
    made = _from_logits(replace(batch, targets=targets), logits)
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
    return _with_tokens(batch, needs) if "tokens" in needs else batch


def _with_tokens(batch: Pairs, needs: frozenset[str]) -> Pairs:
    lengths = torch.stack([batch.chosen_len, batch.rejected_len], 1).flatten().long()
    number = int(lengths.sum())
    tokens = Tokens(
        _logps(number), torch.ones(number, dtype=torch.float64), torch.arange(2 * B).repeat_interleave(lengths),
        _logps(number) if "reference" in needs else None,
        collision=_logps(number, scale=2.0) if "collision" in needs else None,
    )  # fmt: skip
    made = _summed(replace(batch, tokens=tokens), tokens.logps)
    if tokens.ref_logps is None:
        return made
    return replace(made, ref_chosen_logps=_sum(tokens, tokens.ref_logps, 0), ref_rejected_logps=_sum(tokens, tokens.ref_logps, 1))


def _sum(tokens: Tokens, values: Tensor, side: int) -> Tensor:
    return values.new_zeros(2 * B).index_add(0, tokens.sequence, values)[side::2]


def _summed(batch: Pairs, logps: Tensor) -> Pairs:
    """The pairs whose tokens have these log-probabilities."""
    assert batch.tokens is not None
    chosen, rejected = (_sum(batch.tokens, logps, side) for side in (0, 1))
    return replace(batch, tokens=replace(batch.tokens, logps=logps), chosen_logps=chosen, rejected_logps=rejected)


def _rated(needs: frozenset[str]) -> Rated:
    ref = _logps(B, scale=9.0) if "reference" in needs else None
    length = torch.tensor([3.0, 5.0, 2.0, 4.0], dtype=torch.float64)
    batch = Rated(_logps(B, scale=9.0), length, torch.tensor([True, False, True, False]), ref)
    if "mismatch" not in needs:
        return batch
    return replace(batch, other_logps=_logps(B, scale=9.0), ref_other_logps=_logps(B, scale=9.0) if ref is not None else None)


def _lists(needs: frozenset[str]) -> Lists:
    present = torch.tensor([[True] * K, [True] * K, [True] * (K - 1) + [False], [True] * K])
    ref = _logps(B, K, scale=9.0) * present if "reference" in needs else None
    length = torch.randint(2, 7, (B, K)).double() * present
    return Lists(_logps(B, K, scale=9.0) * present, length, torch.randn(B, K, dtype=torch.float64), present, ref)


def _refuses(objective: Any, batch: Lists) -> bool:
    try:
        objective(batch)
    except UsageError:
        return True
    return False


def _whole_lists(batch: Lists) -> Lists:
    """No answer missing, scores those of a square with ones on its diagonal: for objectives that refuse other lists."""
    full, square = torch.ones_like(batch.present), torch.eye(round(K**0.5), dtype=torch.float64).flatten()
    return replace(batch, present=full, logps=batch.logps - 0.5, length=batch.length.clamp(min=2), score=square.repeat(B, 1))


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


def _leaves(batch: Any) -> list[str]:
    """Names of the policy's scores; with whole logits the log-probabilities follow from them."""
    present = [f.name for f in fields(batch) if f.name in LEAVES and getattr(batch, f.name) is not None]
    if getattr(batch, "tokens", None) is not None:
        return ["tokens", *(n for n in present if n == "sampled_logps")]
    return ["logits"] if "logits" in present else present


def _leaf(batch: Any, name: str) -> Tensor:
    return batch.tokens.logps if name == "tokens" else getattr(batch, name)


def _from_logits(batch: Tokens, logits: Tensor) -> Tokens:
    assert batch.targets is not None
    logps = logits.log_softmax(-1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
    return replace(batch, logits=logits, logps=logps)


def _with(batch: Any, values: dict[str, Tensor]) -> Any:
    if isinstance(batch, Tokens) and "logits" in values:
        return _from_logits(batch, values["logits"])
    if "tokens" in values and isinstance(batch, Pairs):
        batch = _summed(batch, values["tokens"])
    return replace(batch, **{n: v for n, v in values.items() if n != "tokens"})


def _alternating(like: Tensor, name: str, size: float) -> Tensor:
    pattern = torch.arange(like.numel()).view(like.shape) % 2
    if name == "rejected_logps":
        pattern = 1 - pattern
    return (pattern * 2 - 1) * size if name == "logits" else -(pattern.to(like.dtype) * size) - 1e-3


def _forward(batch: Any, noise: bool) -> Callable[..., Any]:
    """Scores as a function of embeddings, for objectives that score again: the embeddings are added
    linearly."""
    embedded = torch.zeros(1, batch_rows(batch), WIDTH, dtype=torch.float64)

    def forward(_: Any, embed: Callable[[Tensor], Tensor] | None = None, **overrides: Any) -> Any:
        if embed is None or not noise:
            return batch
        change = embed(embedded)[0]
        values = {n: _leaf(batch, n) for n in _leaves(batch)}
        return _with(batch, {n: v + 100 * (change @ _readout(v)).view(v.shape) for n, v in values.items()})

    return forward


def batch_rows(batch: Any) -> int:
    """Number of rows of the first policy field."""
    return _leaf(batch, _leaves(batch)[0]).shape[0]


def _readout(v: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(WIDTH, v.numel() // v.shape[0], generator=generator, dtype=torch.float64)


def _rows(batch: Any) -> Any:
    return layout([[1, 2, 3], [4, 5, 6, 7, 8, 9]])


# --- checks ------------------------------------------------------------------------------------------------


def _shape(id: str, case: Case, loss: Tensor, metrics: dict[str, Tensor]) -> None:
    assert loss.shape == (case.units,), f"{id}: loss has shape {tuple(loss.shape)}, expected [{case.units}] (one per unit)"
    assert loss.dtype == torch.float64, f"{id}: float64 scores gave a {loss.dtype} loss"
    for name, value in metrics.items():
        assert value.shape in ((), (case.units,)), f"{id}: metric {name} has shape {tuple(value.shape)}"
        assert torch.isfinite(value.double()).all(), f"{id}: metric {name} is not finite"


def _gradient(id: str, case: Case) -> str:
    batch = case.batch()
    names = _leaves(batch)
    values = [_leaf(batch, n).clone().requires_grad_() for n in names]

    def loss(*leaves: Tensor) -> Tensor:
        return case.run(_with(batch, dict(zip(names, leaves, strict=True))))[0]

    grads = torch.autograd.grad(loss(*values).sum(), values, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads), f"{id}: no gradient reaches the policy's scores"
    assert all(g is None or torch.isfinite(g).all() for g in grads), f"{id}: the gradient is not finite"
    source = _source(part.load(id))
    if "detach" in source or "no_grad" in source:
        return "gradient is finite"
    try:
        torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-5, rtol=1e-4)
    except RuntimeError as e:
        raise AssertionError(f"{id}: the gradient is not that of the loss ({e})") from None
    return "gradient agrees with finite differences"


def _source(obj: Any) -> str:
    """Source of a part and of its own module's functions that it names; what it imports (metrics) has no say."""
    own = inspect.getsource(obj)
    helpers = inspect.getmembers(inspect.getmodule(obj), lambda f: inspect.isfunction(f) and f.__module__ == obj.__module__)
    return own + "".join(inspect.getsource(f) for name, f in helpers if f"{name}(" in own and f is not obj)


def _finite_at_extremes(id: str, case: Case) -> None:
    for size in (1e4, 1e-9):
        for kind in (torch.float64, torch.float32):
            batch = _cast(case.batch(extreme=size), kind)
            values = {n: _leaf(batch, n).clone().requires_grad_() for n in _leaves(batch)}
            loss, metrics = case.run(_with(batch, values))
            loss.sum().backward()
            assert torch.isfinite(loss).all(), f"{id}: loss {loss.tolist()} at scores of size {size:g} in {kind}"
            for name, v in values.items():
                assert v.grad is None or torch.isfinite(v.grad).all(), f"{id}: gradient of {name} at size {size:g} in {kind}"
            for name, m in metrics.items():
                assert torch.isfinite(m).all(), f"{id}: metric {name} at scores of size {size:g} in {kind}"


def _cast(batch: Any, kind: torch.dtype) -> Any:
    return _mapped(batch, lambda v: v.to(kind) if v.is_floating_point() else v)


def _mapped(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    given = {x.name: v for x in fields(batch) if (v := getattr(batch, x.name)) is not None}
    return replace(batch, **{n: f(v) if isinstance(v, Tensor) else _mapped(v, f) for n, v in given.items()})


def _permutation(id: str, case: Case) -> None:
    """Units in another order give the same losses in that order."""
    batch = case.batch()
    order = torch.randperm(case.units, generator=torch.Generator().manual_seed(5))
    plain, _ = case.run(batch, noise=False)
    permuted, _ = case.run(_permuted(batch, order), noise=False)
    assert torch.allclose(plain[order], permuted, atol=1e-9), f"{id}: the loss depends on the order of the batch"


def _permuted(batch: Any, order: Tensor) -> Any:
    given = {f.name: v for f in fields(batch) if (v := getattr(batch, f.name)) is not None}
    tokens = given.pop("tokens", None) if isinstance(batch, Pairs) else None
    if isinstance(batch, Rollouts):
        given.pop("reward")
    moved = replace(batch, **{n: v[order] for n, v in given.items()})
    if tokens is None:
        return moved
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    sequence = 2 * place[tokens.sequence // 2] + tokens.sequence % 2
    by_sequence = torch.argsort(sequence, stable=True)
    return replace(moved, tokens=_mapped(replace(tokens, sequence=sequence), lambda v: v[by_sequence]))


def _inputs_unchanged(id: str, case: Case) -> None:
    batch, copy = case.batch(), case.batch()
    case.run(batch)
    _equal(id, batch, copy)


def _equal(id: str, batch: Any, copy: Any) -> None:
    for f in fields(batch):
        a, b = getattr(batch, f.name), getattr(copy, f.name)
        if isinstance(a, Tensor):
            assert torch.equal(a, b), f"{id} changes its input {f.name} in place"
        elif a is not None:
            _equal(id, a, b)
