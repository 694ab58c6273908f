"""Every optimizer as a ``torch.optim.Optimizer``: ``Lion(model.parameters(), lr=1e-4, weight_decay=0.1,
beta1=0.9)``.

``params`` are tensors, ``(name, tensor)`` pairs, group dicts, or a model: a model is grouped as in ``metier
run`` (no weight decay on gains and biases; matrix methods leave embeddings and head to their fallback).
"""

import functools
import inspect
from typing import Any

from metier.core.part import Built, check_options, namespace, options


def _factory(rule: Any) -> Any:
    own = options(rule)
    shared = ("lr", "weight_decay", "groups", "state_dtype")

    @functools.wraps(rule, updated=())
    def make(params: Any, **given: Any) -> Any:
        from torch import nn

        from metier.core import optim
        from metier.core.errors import UsageError

        schema = {**options(optim.common_options), **own}
        values = check_options(schema, given, owner=rule.__metier__.id)
        common = {k: v for k, v in values.items() if k in shared and k not in own}
        bound = {k: v for k, v in values.items() if k in own}
        built = Built(rule.__metier__.id, rule.__metier__, rule(**bound), bound)
        if isinstance(params, nn.Module):
            return optim.build(params, built, **common)
        if common.pop("groups", None) is not None:
            raise UsageError("groups needs the model", hint="Give the model instead of its parameters.")
        if common.get("lr") is None:
            common["lr"] = optim.default_lr(built.obj)
        return optim.Optimizer(params, built.obj, **common)

    kind = inspect.Parameter
    keywords = {name: kind(name, kind.KEYWORD_ONLY, default=None) for name in shared}
    keywords |= {p.name: p for p in inspect.signature(rule).parameters.values()}
    make.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [kind("params", kind.POSITIONAL_OR_KEYWORD), *keywords.values()]
    )
    return make


__getattr__, __dir__ = namespace("optimizer", _factory)
