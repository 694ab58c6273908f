"""Optimizers: a :class:`Rule` says how one tensor moves, :class:`Optimizer` does everything else.

A rule is a frozen dataclass with two pure-looking methods. The core gives it: parameter groups, decoupled
weight decay, float32 arithmetic for low-precision parameters, stacking of equal shapes, sharded tensors,
closures, saving and loading. The update is ``p ← (1 - lr · weight_decay) p - lr · direction``; the rule sees
``p`` before the decay.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metier.core import groups as grouping
from metier.core import part, stacking
from metier.core.errors import UsageError
from metier.core.optimizer import Optimizer
from metier.core.part import Built, NonNegative, Positive

__all__ = ["Optimizer", "Rule", "State", "build", "common_options", "default_lr"]

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one tensor moves. Subclasses are frozen keyword-only dataclasses; their fields are options."""

    matrices: ClassVar[bool] = False
    """A method for 2-D hidden-layer weights. ``init`` gets one matrix ``[m, n]``; ``update`` gets a stack of
    k equal shapes: ``g``, ``p`` ``[k, m, n]``, state ``[k, …]``. Everything else is moved by
    :attr:`fallback`."""
    elementwise: ClassVar[bool] = False
    """Entry i of state and direction depends on entry i of ``g`` and ``p`` only: sharded tensors are then
    updated piece by piece; otherwise they are gathered and every process computes the whole."""
    default_lr: ClassVar[float] = 1e-3
    """Peak learning rate when none is given."""
    fallback: ClassVar[str] = "optimizer/adamw"
    """Part that moves what a matrix method does not."""

    def init(self, p: Tensor) -> State:
        """State of one tensor before its first step: new tensors that share no memory with ``p``."""
        return {}

    def update(self, g: Tensor, p: Tensor, state: State, t: int) -> Tensor:
        """The direction to move against, shaped as ``p``, at step t = 1, 2, … of this tensor.

        Changes ``state`` in place, never ``g`` or ``p``; all are at least float32. Randomness must be a
        function of ``t`` and ``state``, so that replicas agree.
        """
        raise NotImplementedError

    def apply(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        t: int,
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        """One step of a list of equal dtype, device and ``t``, in place. Override to fuse it."""
        if not self.matrices:
            return self.plain(params, grads, states, t, lr=lr, weight_decay=weight_decay)
        same_shape = stacking.buckets(range(len(params)), lambda i: params[i].shape, lambda i: params[i].numel())
        for rows in same_shape:
            self._stacked(
                [params[i] for i in rows],
                [grads[i] for i in rows],
                [states[i] for i in rows],
                t,
                lr,
                weight_decay,
            )
        return None

    def plain(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        t: int,
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        """The same as :meth:`apply`, one tensor at a time: what a fused implementation must reproduce."""
        for p, g, state in zip(params, grads, states, strict=True):
            if self.matrices:
                self._stacked([p], [g], [state], t, lr, weight_decay)
            else:
                _move([p], [self.update(g, p, state, t)], lr, weight_decay)

    def _stacked(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        t: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        state = {key: stacking.stack([s[key] for s in states]) for key in states[0]}
        direction = self.update(stacking.stack(grads), stacking.stack(params), state, t)
        for key, value in state.items():
            stacking.unstack(value, [s[key] for s in states])
        _move(params, list(direction.unbind(0)), lr, weight_decay)


def _move(params: list[Tensor], directions: list[Tensor], lr: float, weight_decay: float) -> None:
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr)


def default_lr(rule: Rule) -> float:
    """Peak learning rate that a rule uses when none is given."""
    return float(rule.default_lr)


def common_options(
    *,
    lr: Positive | None = None,
    weight_decay: NonNegative = 0.0,
    groups: dict[str, dict[str, float]] | None = None,
    state_dtype: Literal["fp32", "bf16"] | None = None,
) -> None:
    """Options that every optimizer shares.

    ``lr``: peak learning rate; the rule's ``default_lr`` when not given. ``weight_decay``: decoupled, not
    applied to gains and biases. ``groups``: glob on parameter names (or a role of
    :data:`metier.core.groups.ROLES`) → ``lr``, ``lr_scale``, ``weight_decay``. ``state_dtype``: storage of
    the optimizer state.
    """


def build(
    model: nn.Module, built: Built, *, attached: Any = None, lr: float | None = None,
    weight_decay: float = 0.0, groups: grouping.Overrides | None = None,
    state_dtype: Literal["fp32", "bf16"] | None = None,
) -> Optimizer:  # fmt: skip
    """The optimizer of a model's trainable parameters, grouped by :func:`metier.core.groups.roles`.

    ``attached`` is accepted for rules that pair up adapter factors. Under a matrix method ``lr`` is the
    learning rate of the matrices and the fallback gets ``lr`` times the ratio of the two rules' defaults;
    ``groups`` can set it apart.
    """
    rule: Rule = built.obj
    peak = default_lr(rule) if lr is None else lr
    fallback_lr = None
    if rule.matrices:
        kind, _, name = rule.fallback.partition("/")
        fallback_lr = peak * default_lr(part.build(kind, name).obj) / default_lr(rule)
    split = grouping.split(model, lr=peak, fallback_lr=fallback_lr, weight_decay=weight_decay, groups=groups)
    if not split:
        raise UsageError("no parameter is trainable")
    return Optimizer(split, rule, lr=peak, weight_decay=weight_decay, state_dtype=state_dtype)
