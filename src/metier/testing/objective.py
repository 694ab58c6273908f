"""What every objective must do: right shape, right gradient, finite everywhere, indifferent to the order of
the batch.

The batch is synthetic, of the type that the objective reads, with the fields it declares to need and no
others. An objective that detaches on purpose (a baseline, a weight) cannot agree with finite differences: for
a part whose source says ``detach`` or ``no_grad`` the gradient is only checked to be finite, and its oracle
test must compare it. One with a state keeps all of it in ``state_dict`` and changes it in ``observe`` only.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from metier.core import part
from metier.core.batch import Lists, Rollouts, Tokens
from metier.core.errors import UsageError
from metier.core.lossmodule import batch_type, scores_again
from metier.testing._batches import MAKERS, B, N, alternating, leaf, leaves, mapped, permuted, whole_lists, with_scores
from metier.testing._sample import sample
from metier.testing._tiny import layout

WIDTH = 2


def check(id: str, **options: Any) -> list[str]:
    """Run the suite on the objective ``id``, with its defaults or other ``options``.

    Returns the names of the checks; raises ``AssertionError``.
    """
    case = _case(id, options)
    loss, metrics = case.run(case.batch())
    _shape(id, case, loss, metrics)
    gradient = _gradient(id, case)
    _finite_at_extremes(id, case)
    _permutation(id, case)
    _inputs_unchanged(id, case)
    state = _state(id, case, _case(id, options))
    return ["shape", gradient, "finite at extremes", "order of the batch", "inputs unchanged", *state]


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
            made = whole_lists(made, self.needs)
        if extreme is None:
            return made
        return with_scores(made, {n: alternating(leaf(made, n), n, extreme) for n in leaves(made)})

    def run(self, batch: Any, *, noise: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch, the same at every call. ``noise``: let ``embed`` change the scores."""
        torch.manual_seed(1)
        again = scores_again(self.obj)
        result = self.obj(_forward(batch, noise), _rows(batch)) if again else self.obj(self.condensed(batch))
        return result if isinstance(result, tuple) else (result, {})

    def condensed(self, batch: Any) -> Any:
        """What the core keeps of a batch for an objective with ``condense``."""
        return self.obj.condense(batch) if hasattr(self.obj, "condense") else batch


def _case(id: str, options: Mapping[str, Any] | None = None) -> Case:
    built = sample(id, **(options or {}))
    return Case(built.obj, batch_type(built.obj), built.needs)


def _refuses(objective: Any, batch: Lists) -> bool:
    try:
        objective(batch)
    except UsageError:
        return True
    return False


def _forward(batch: Any, noise: bool) -> Callable[..., Any]:
    """Scores as a function of embeddings, for objectives that score again: the embeddings are added
    linearly."""
    embedded = torch.zeros(1, batch_rows(batch), WIDTH, dtype=torch.float64)

    def forward(_: Any, embed: Callable[[Tensor], Tensor] | None = None, **overrides: Any) -> Any:
        if embed is None or not noise:
            return batch
        change = embed(embedded)[0]
        values = {n: leaf(batch, n) for n in leaves(batch)}
        return with_scores(batch, {n: v + 100 * (change @ _readout(v)).view(v.shape) for n, v in values.items()})

    return forward


def batch_rows(batch: Any) -> int:
    """Number of rows of the first policy field."""
    return leaf(batch, leaves(batch)[0]).shape[0]


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
    names = leaves(batch)
    values = [leaf(batch, n).clone().requires_grad_() for n in names]

    def loss(*scores: Tensor) -> Tensor:
        return case.run(with_scores(batch, dict(zip(names, scores, strict=True))))[0]

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
            values = {n: leaf(batch, n).clone().requires_grad_() for n in leaves(batch)}
            loss, metrics = case.run(with_scores(batch, values))
            loss.sum().backward()
            assert torch.isfinite(loss).all(), f"{id}: loss {loss.tolist()} at scores of size {size:g} in {kind}"
            for name, v in values.items():
                assert v.grad is None or torch.isfinite(v.grad).all(), f"{id}: gradient of {name} at size {size:g} in {kind}"
            for name, m in metrics.items():
                assert torch.isfinite(m).all(), f"{id}: metric {name} at scores of size {size:g} in {kind}"


def _cast(batch: Any, kind: torch.dtype) -> Any:
    return mapped(batch, lambda v: v.to(kind) if v.is_floating_point() else v)


def _permutation(id: str, case: Case) -> None:
    """Units in another order give the same losses in that order."""
    batch = case.batch()
    order = torch.randperm(case.units, generator=torch.Generator().manual_seed(5))
    plain, _ = case.run(batch, noise=False)
    moved, _ = case.run(permuted(batch, order), noise=False)
    assert torch.allclose(plain[order], moved, atol=1e-9), f"{id}: the loss depends on the order of the batch"


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


def _state(id: str, case: Case, other: Case) -> list[str]:
    """Calls do not change a state; what was observed is in ``state_dict``, as JSON, and another object can go on from it."""
    if not hasattr(case.obj, "observe"):
        return []
    batch = case.batch()
    before = _json(id, case)
    case.run(batch)
    assert _json(id, case) == before, f"{id} changes its state outside of observe"
    scores = {n: leaf(batch, n).clone().requires_grad_() for n in leaves(batch)}
    case.obj.observe(case.condensed(with_scores(batch, scores)))
    other.obj.load_state_dict(json.loads(_json(id, case)))
    assert _json(id, other) == _json(id, case), f"{id}: a state that was loaded is not the one that was saved"
    assert torch.equal(case.run(batch)[0], other.run(batch)[0]), f"{id}: something is missing in state_dict"
    assert torch.isfinite(case.run(batch)[0]).all(), f"{id}: the loss is not finite after a step was observed"
    return ["state"]


def _json(id: str, case: Case) -> str:
    try:
        return json.dumps(case.obj.state_dict(), allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise AssertionError(f"{id}: state_dict is not plain JSON: {problem}") from None
