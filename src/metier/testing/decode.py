"""What every decode part must do: act only while attached, and leave the model exactly as it was."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from metier.core import models
from metier.core.errors import UsageError
from metier.testing._sample import sample
from metier.testing._tiny import same, weights

FAMILIES = ("lab/llama-50k", "lab/gpt2-1m")


def check(id: str) -> list[str]:
    """Run the suite on the decode part ``id``. Returns the names of the checks; raises ``AssertionError``."""
    obj = sample(id).obj
    does = [name for name, ok in (("attach", hasattr(obj, "attach")), ("scores", callable(obj))) if ok]
    assert does, f"{id} defines neither attach(model, tokenizer) nor __call__(input_ids, scores)"
    accepted = [name for name in FAMILIES if "attach" not in does or _attach(id, name)]
    assert accepted, f"{id} accepts none of {', '.join(FAMILIES)}"
    if "scores" in does:
        _scores(id, obj)
    return [f"{name} ({family})" for name in does for family in accepted]


def _attach(id: str, name: str) -> bool:
    bundle = models.load(name, seed=0)
    model = bundle.model.eval()
    ids = torch.randint(5, 200, (2, 8), generator=torch.Generator().manual_seed(0))
    before, state, hooks = _logits(model, ids), weights(model), _hooks(model)
    part = sample(id).obj
    try:
        with part.attach(model, bundle.tokenizer):
            inside = _logits(model, ids)
            again = _logits(model, ids)
            written = _generate(model, ids)
    except UsageError:
        return False
    assert torch.isfinite(inside).all(), f"{id} on {name}: logits are not finite"
    assert torch.equal(inside, again), f"{id} on {name}: two passes while attached differ"
    assert written.shape[1] == ids.shape[1] + 4, f"{id} on {name}: generation fails while attached"
    with suppress(RuntimeError), part.attach(model, bundle.tokenizer):
        raise RuntimeError("leaving by an error")
    assert _hooks(model) == hooks, f"{id} on {name}: hooks are left behind"
    assert same(weights(model), state), f"{id} on {name}: the weights changed"
    assert torch.equal(_logits(model, ids), before), f"{id} on {name}: detached, the model answers differently"
    assert not any(m.training for m in model.modules()), f"{id} on {name}: modules are left in training mode"
    return True


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def _generate(model: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=True,
    )


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _scores(id: str, obj: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (3, 6), generator=generator)
    scores = torch.randn(3, 2048, generator=generator)
    given = scores.clone()
    out = obj(ids, scores)
    assert out.shape == given.shape, f"{id}: scores of shape {tuple(given.shape)} become {tuple(out.shape)}"
    assert not torch.isnan(out).any(), f"{id}: scores are not numbers"
    assert torch.isfinite(out).any(1).all(), f"{id}: nothing can be sampled"
