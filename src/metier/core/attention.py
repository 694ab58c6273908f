"""Attention with something in between: maps of the logits or of the probabilities, and observers.

A function of our own is registered with transformers and chosen in the ``config`` of the attention modules alone (a copy
of the model's). The model goes on making its masks for the implementation it was loaded with, so packed rows, prompts
computed once, key-value caches and sliding windows work as before. Without maps, attention is computed by the kernel that
would have computed it (SDPA); with maps, in plain matrix products that hold ``[B, H, T, S]`` logits.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import segments
from metier.core.errors import UsageError
from metier.core.sublayers import attentions

NAME = "metier"
ATTRIBUTE = "metier_attention"
Map = Callable[[Tensor], Tensor]
ROWS_BYTES = 32 * 2**20
"""Memory for the logits that an observer sees at a time."""


@dataclass
class Control:
    """What one attention module does besides; kept as its attribute ``metier_attention``."""

    base: str
    """The implementation that computes attention when there are no maps."""
    config: Any
    """The configuration that the module had."""
    scale: float = 1.0
    """Multiplies the logits before every map."""
    logits: list[Map] = field(default_factory=list)
    """Maps of ``[B, H, T, S]`` logits in float32 (float64 stays), in order, before the mask."""
    probabilities: list[Map] = field(default_factory=list)
    """Maps of the probabilities, after the softmax."""
    observers: list[Callable[["Seen"], None]] = field(default_factory=list)

    @property
    def mapped(self) -> bool:
        """Whether the plain computation is needed."""
        return bool(self.logits or self.probabilities)


@dataclass(frozen=True)
class Seen:
    """One call of an attention module, for observers; ``[B, H, T, d]`` queries, ``[B, G, S, d]`` keys."""

    module: Any
    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    is_causal: bool
    learning: bool
    """Whether gradients were on: not so for evaluations and reference models."""

    def rows(self, limit: int = ROWS_BYTES) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """``(query positions, logits, probabilities, visible)`` for a few query positions at a time.

        ``logits`` are ``q·k`` with the module's own scaling, before every map; ``probabilities`` are those that weight
        the values; both ``[B, H, t, S]`` in float32, ``visible`` bool and broadcast against them.
        """
        control: Control = getattr(self.module, ATTRIBUTE)
        count, length = self.query.shape[2], self.key.shape[2]
        step = max(1, limit // (4 * self.query.shape[0] * self.query.shape[1] * length))
        key = _repeated(self.key, self.query.shape[1])
        mask = _visible(self.mask, count, length, self.is_causal, self.query.device)
        for begin in range(0, count, step):
            part = slice(begin, min(count, begin + step))
            z = _products(self.query[:, :, part], key, self.scaling)
            some = None if mask is None else mask[..., part, :] if mask.shape[-2] > 1 else mask
            visible = torch.ones((), dtype=torch.bool, device=z.device) if some is None else _as_bool(some)
            yield part, z, _weights(control, z, some, self.softcap), visible


# --- setting it up ---------------------------------------------------------------------------------------------


def controls(model: Any, where: str) -> list[Control]:
    """The controls of all attention modules of a model, made where there are none yet.

    Raises ``UsageError`` for a model whose attention does not go through transformers' interface.
    """
    return [_control(module, where) for module in attentions(model, where)]


def _control(module: Any, where: str) -> Control:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if hasattr(module, ATTRIBUTE):
        return getattr(module, ATTRIBUTE)
    source = sys.modules[type(module).__module__]
    base = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
    if not hasattr(source, "ALL_ATTENTION_FUNCTIONS") or not hasattr(module, "config"):
        raise UsageError(f"{type(module).__name__} does not use transformers' attention interface", where=where)
    if base not in ("eager", "sdpa", segments.NAME):
        raise UsageError(f"attention {base} shows nobody its logits", where=where, hint="Use sdpa.")
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    control = Control(base, module.config)
    setattr(module, ATTRIBUTE, control)
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = NAME  # the property would also set it in configurations inside this one
    return control


def _release(module: Any) -> None:
    """Back to the module's own configuration, unless there is still something to do."""
    control: Control = getattr(module, ATTRIBUTE)
    if not control.mapped and not control.observers and control.scale == 1.0:
        module.config = control.config
        delattr(module, ATTRIBUTE)


def map_logits(model: Any, function: Map, where: str) -> None:
    """Apply ``function`` to the logits of every attention module, after the maps that are there and before the mask."""
    for control in controls(model, where):
        control.logits.append(function)


def map_probabilities(model: Any, function: Map, where: str) -> None:
    """Apply ``function`` to the probabilities of every attention module, after the maps that are there."""
    for control in controls(model, where):
        control.probabilities.append(function)


def scale_logits(model: Any, factor: float, where: str) -> None:
    """Multiply the logits after the maps that are there; free of cost while there are none."""
    for control in controls(model, where):
        if control.logits or getattr(control.config, "attn_logit_softcapping", None) is not None:
            control.logits.append(_Times(factor))
        else:
            control.scale *= factor


@dataclass(frozen=True)
class _Times:
    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


@dataclass(frozen=True)
class Cap:
    """``c tanh(x / c)``: the identity near 0, never beyond ``c``."""

    cap: float

    def __call__(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return self.cap * torch.tanh(x / self.cap)


@contextmanager
def observed(model: Any, observer: Callable[[Seen], None], where: str) -> Iterator[None]:
    """``observer`` sees every call of the attention modules inside, without gradient; what they compute is unchanged.

    Calls that recompute a checkpointed block during the backward pass are not shown.
    """
    undo = observe(model, observer, where)
    try:
        yield
    finally:
        undo()


def observe(model: Any, observer: Callable[[Seen], None], where: str) -> Callable[[], None]:
    """As :func:`observed`, until the function that is returned is called."""
    modules = attentions(model, where)
    for module in modules:
        _control(module, where).observers.append(observer)

    def undo() -> None:
        for module in modules:
            kept = getattr(module, ATTRIBUTE).observers
            kept[:] = [o for o in kept if o is not observer]
            _release(module)

    return undo


# --- computing it ----------------------------------------------------------------------------------------------


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **more: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention as transformers calls it: ``[B, H, T, d]`` queries, ``[B, G, S, d]`` keys and values -> ``[B, T, H, d]``.

    ``attention_mask`` is boolean (true: visible) or additive, ``[B, 1, T, S]``; without one a causal module sees the
    earlier positions.
    """
    control: Control = getattr(module, ATTRIBUTE)
    factor: float = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = more.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else causal
    if control.observers and torch._C._current_graph_task_id() == -1:
        softcap, learning = more.get("softcap"), torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            seen = Seen(module, query.detach(), key.detach(), attention_mask, factor, softcap, causal, learning)
            for observer in list(control.observers):
                observer(seen)
    if not control.mapped:
        base = _base(module, control.base)
        return base(module, query, key, value, attention_mask, dropout=dropout, scaling=factor * control.scale, **more)
    if strange := [k for k in ("s_aux", "position_bias") if more.get(k) is not None]:
        raise UsageError(f"{type(module).__name__} has attention with {strange[0]}, whose logits cannot be mapped")
    mask = _visible(attention_mask, query.shape[2], key.shape[2], causal, query.device)
    logits = _products(query, _repeated(key, query.shape[1]), factor)
    weights = _weights(control, logits, mask, more.get("softcap")).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ _repeated(value, query.shape[1])).transpose(1, 2).contiguous(), weights


def _base(module: nn.Module, name: str) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return ALL_ATTENTION_FUNCTIONS[name]


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values of groups of heads, for each head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _products(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    z = query @ key.transpose(-1, -2)
    return z.to(torch.promote_types(z.dtype, torch.float32)) * scaling


def _weights(control: Control, z: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """Probabilities of ``[B, H, t, S]`` logits: scale, the family's own cap, maps, mask, softmax, maps."""
    z = z if control.scale == 1.0 else z * control.scale
    z = z if softcap is None else Cap(softcap)(z)
    for function in control.logits:
        z = function(z)
    if mask is not None:
        z = z.masked_fill(~mask, torch.finfo(z.dtype).min) if mask.dtype == torch.bool else z + mask
    p = torch.softmax(z, dim=-1)
    for function in control.probabilities:
        p = function(p)
    return p


def _as_bool(mask: Tensor) -> Tensor:
    """Where attention may look: an additive mask hides with very negative numbers."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _visible(mask: Tensor | None, queries: int, keys: int, causal: bool, device: torch.device) -> Tensor | None:
    if mask is not None:
        return mask[..., :keys]
    if not causal or queries == 1:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
