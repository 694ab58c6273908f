"""What every model part must do: leave a model that trains, saves, loads, generates and sees no future
tokens."""

import copy
from typing import Any

import torch
from torch import Tensor

from metier.core import models
from metier.core.errors import UsageError
from metier.testing._sample import sample
from metier.testing._tiny import cached, tiny

FAMILIES = ("lab/llama-50k", "lab/gpt2-1m", "lab/qwen2-1m", "lab/bert-1m")


def check(id: str) -> list[str]:
    """Run the suite on the model part ``id``, on every family it accepts. Raises ``AssertionError``."""
    ran = []
    for name in FAMILIES:
        changed = _changed(id, name)
        if changed is not None:
            ran += [f"{check} ({name})" for check in _family(id, name, changed)]
    assert ran, f"{id} accepts none of {', '.join(FAMILIES)}"
    return ran


def _changed(id: str, name: str) -> Any:
    torch.manual_seed(1)
    try:
        return sample(id).obj(models.load(name, seed=0).model).eval()
    except UsageError:
        return None


def _family(id: str, name: str, model: Any) -> list[str]:
    label = f"{id} on {name}"
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = _logits(model, ids)
    assert torch.isfinite(logits).all(), f"{label}: logits are not finite"
    assert torch.equal(logits, _logits(model, ids)), f"{label}: two evaluations differ"
    model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert grads, f"{label}: no parameter gets a gradient"
    assert all(torch.isfinite(g).all() for g in grads.values()), f"{label}: gradients are not finite"
    model.zero_grad(set_to_none=True)
    _rebuilt(id, name, label, model, ids)
    ran = ["forward", "gradient", "rebuilt"]
    if name != "lab/bert-1m":
        _causal(label, model, ids)
        _cache(label, model, ids)
        ran += ["causal", "cache"]
    if name == "lab/llama-50k":
        _step(label, copy.deepcopy(model))
        ran.append("step")
    return ran


@torch.no_grad()
def _logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    return model(input_ids=ids, **more).logits


def _rebuilt(id: str, name: str, label: str, model: Any, ids: Tensor) -> None:
    """Applied to a model with other weights, then loaded strictly: this is how a saved run comes back."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    logits = _logits(model, ids)
    torch.manual_seed(2)
    other = sample(id).obj(models.load(name, seed=5).model).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(_logits(other, ids), logits), f"{label}: rebuilt and loaded, it answers differently; state is missing"
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01)


def _causal(label: str, model: Any, ids: Tensor) -> None:
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 200
    same = torch.allclose(_logits(model, ids)[:, :-1], _logits(model, other)[:, :-1], atol=1e-5)
    assert same, f"{label}: earlier positions see later tokens"


def _cache(label: str, model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        first = cached(model, ids[:, :5])
        second = cached(model, ids[:, 5:], first.past_key_values)
    whole = _logits(model, ids)
    assert torch.allclose(second.logits, whole[:, 5:], atol=1e-4), f"{label}: with a key-value cache the logits differ"


def _step(label: str, model: Any) -> None:
    run = tiny(model=model)
    before = [p.detach().clone() for p in model.parameters()]
    run.step()
    assert any(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True)), (
        f"{label}: a training step changes nothing"
    )
