"""What every probe must do: answer in JSON, the same twice, and leave the model as it was."""

import json
from typing import Any

import torch

from metier.core.batch import Tokens
from metier.core.probing import Probe, undisturbed
from metier.testing._sample import sample
from metier.testing._tiny import layouts, same, tiny, weights


def check(id: str) -> list[str]:
    """Run the suite on the probe ``id``. Returns the names of the checks; raises ``AssertionError``."""
    probe = tiny_probe()
    before, state = weights(probe.model), torch.get_rng_state()
    hooks, modes = _hooks(probe.model), [m.training for m in probe.model.modules()]
    first = _measure(id, probe)
    assert same(weights(probe.model), before), f"{id} changes the weights"
    assert _hooks(probe.model) == hooks, f"{id} leaves hooks on the model"
    assert [m.training for m in probe.model.modules()] == modes, f"{id} leaves modules in another mode"
    assert all(p.grad is None for p in probe.model.parameters()), f"{id} leaves gradients"
    assert all(p.requires_grad for p in probe.model.parameters()), f"{id} leaves parameters frozen"
    assert torch.equal(torch.get_rng_state(), state), f"{id} draws from the global generator"
    assert isinstance(first, dict), f"{id} gives {type(first).__name__}, expected a dict"
    try:
        text = json.dumps(first, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise AssertionError(f"{id}: the result is not plain JSON ({e})") from None
    assert json.dumps(_measure(id, probe), allow_nan=False) == text, f"{id}: a second measurement differs"
    return ["model unchanged", "JSON", "repeatable"]


def tiny_probe(count: int = 6) -> Probe:
    """A very small language model and ``count`` layouts of random tokens."""
    ctx = tiny().context
    return Probe(ctx.bundle, ctx.module, Tokens, layouts(count, seed=7), ctx.engine)


def _measure(id: str, probe: Probe) -> Any:
    with undisturbed(probe):
        return sample(id).obj(probe)


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
