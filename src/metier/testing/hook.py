"""What every hook must do: leave a run it does not touch alone, survive a resume, switch off for evaluation.

A hook may change how the run trains. It may not change the weights by an evaluation, nor depend on anything
that a checkpoint does not hold.
"""

import json
from typing import Any

import torch
from torch import Tensor

from metier.core.events import EVENTS
from metier.testing._sample import sample
from metier.testing._tiny import Tiny, same, tiny, weights

STEPS = 4


def check(id: str) -> list[str]:
    """Run the suite on the hook ``id``. Returns the names of the checks; raises ``AssertionError``."""
    hook = sample(id).obj
    assert any(callable(getattr(hook, e, None)) for e in EVENTS), f"{id} listens to no event"
    assert hasattr(hook, "state_dict") == hasattr(hook, "load_state_dict"), f"{id} saves state without loading it, or the reverse"
    whole = _trained(id)
    _repeatable(id, whole)
    _resumes(id, whole)
    _evaluation_leaves_no_trace(id, whole)
    _evaluation_is_deterministic(id)
    _ends_finite(id)
    return [
        "events",
        "repeatable",
        "resumes",
        "evaluation leaves no trace",
        "evaluation is deterministic",
        "ends finite",
    ]


def _trained(id: str, *, evaluate: bool = False) -> dict[str, Tensor]:
    run = _started(id)
    for _ in range(STEPS):
        run.step()
        if evaluate:
            run.evaluate()
    return weights(run.context.model)


def _started(id: str) -> Tiny:
    run = tiny(sample(id).obj, steps=STEPS)
    run.context.model.train()
    run.dispatch("on_start", run.context)
    return run


def _repeatable(id: str, whole: dict[str, Tensor]) -> None:
    torch.manual_seed(12345)
    assert same(_trained(id), whole), f"{id}: the same run gave other weights; draw from ctx.generator(name)"


def _resumes(id: str, whole: dict[str, Tensor]) -> None:
    """Stop after half of the steps, continue with a new object that gets only what a checkpoint holds."""
    first = _started(id)
    for _ in range(STEPS // 2):
        first.step()
    (old,) = first.listeners
    state = _copied(old.state_dict(), id) if hasattr(old, "state_dict") else None
    second = tiny(sample(id).obj, steps=STEPS)
    second.context.model.load_state_dict(weights(first.context.model))
    second.context.optimizer.load_state_dict(first.context.optimizer.state_dict())
    (new,) = second.listeners
    if state is not None:
        new.load_state_dict(state)
    second.context.clock = first.context.clock
    second.context.model.train()
    second.dispatch("on_start", second.context)
    for _ in range(STEPS - STEPS // 2):
        second.step()
    for _ in range(STEPS - STEPS // 2):
        first.step()
    assert same(weights(second.context.model), whole), f"{id}: a resumed run ends elsewhere; something is missing in state_dict"
    if state is not None:
        assert _equal(new.state_dict(), old.state_dict()), f"{id}: the state of a resumed run differs"


def _copied(value: Any, id: str) -> Any:
    """State as a checkpoint keeps it: tensors and JSON, nested; anything else cannot be saved."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        assert all(isinstance(k, str) for k in value), f"{id}: keys of the state must be strings"
        return {k: _copied(v, id) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(v, id) for v in value]
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise AssertionError(f"{id}: {type(value).__name__} in the state is neither a tensor nor JSON") from None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def _evaluation_leaves_no_trace(id: str, whole: dict[str, Tensor]) -> None:
    assert same(_trained(id, evaluate=True), whole), f"{id}: evaluating changes the training"
    run = _started(id)
    run.step()
    before = weights(run.context.model)
    run.dispatch("on_eval_start", run.context)
    run.dispatch("on_eval_end", run.context)
    assert same(weights(run.context.model), before), f"{id}: the weights are not put back after an evaluation"


def _evaluation_is_deterministic(id: str) -> None:
    run = _started(id)
    run.step()
    assert run.evaluate() == run.evaluate(), f"{id}: two evaluations in a row differ (is it active in eval mode?)"


def _ends_finite(id: str) -> None:
    run = _started(id)
    for _ in range(STEPS):
        run.step()
    run.dispatch("on_end", run.context)
    assert all(torch.isfinite(t).all() for t in run.context.model.state_dict().values()), (
        f"{id}: weights are not finite at the end"
    )
    json.dumps(run.context.metrics, default=float)
    never = sample(id).obj
    if hasattr(never, "state_dict"):
        never.load_state_dict(_copied(never.state_dict(), id))
