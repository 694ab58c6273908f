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
from metier.core.step import Step

__all__ = ["Optimizer", "Rule", "State", "Step", "build", "common_options", "default_lr"]

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
    decay_after: ClassVar[bool] = False
    """Weight decay shrinks the weights after the update instead of before it."""
    default_lr: ClassVar[float] = 1e-3
    """Peak learning rate when none is given."""
    fallback: ClassVar[str] = "optimizer/adamw"
    """Part that moves what a matrix method does not."""
    local_gradients: ClassVar[bool] = False
    """In data-parallel runs the rule takes each process's own gradient and does the averaging itself, of something
    smaller. Its ``settle(states)`` makes the state of all processes equal before it is saved."""
    sample_every: ClassVar[int] = 0
    """k > 0: :attr:`Step.sampled` is wanted at t = 1, 1 + k, 1 + 2k, …"""

    def for_role(self, role: str) -> "Rule":
        """The rule that moves the parameters of a role (:data:`metier.core.groups.ROLES`). Its learning rate
        is this rule's times the ratio of the two rules' defaults.
        """
        return self.beside() if self.matrices and role != "matrices" else self

    def beside(self) -> "Rule":
        """The :attr:`fallback` with its default options."""
        kind, _, name = self.fallback.partition("/")
        return part.build(kind, name).obj

    def init(self, p: Tensor) -> State:
        """State of one tensor before its first step: new tensors that share no memory with ``p``."""
        return {}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor | None:
        """The direction to move against, shaped as ``p``; ``None`` leaves ``p`` as it is, without decay.

        Changes ``state`` in place, never ``g`` or ``p``; all are at least float32. Randomness must be a
        function of ``step`` and ``state``, so that replicas agree.
        """
        raise NotImplementedError

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """One step of a list of equal dtype, device and ``t``, in place. Override to fuse it."""
        if not self.matrices:
            return self.plain(params, grads, states, step)
        for rows in stacking.buckets(range(len(params)), lambda i: params[i].shape, lambda i: params[i].numel()):
            kept = [states[i] for i in rows]
            self._stacked([params[i] for i in rows], [grads[i] for i in rows], kept, step.only(rows))
        return None

    def plain(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """The same as :meth:`apply`, one tensor at a time: what a fused implementation must reproduce."""
        for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
            one = step.only([i])
            if self.matrices:
                self._stacked([p], [g], [state], one)
            else:
                self.move([p], [self.update(g, p, state, one)], one)

    def _stacked(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        state = {key: stacking.stack([s[key] for s in states]) for key in states[0]}
        direction = self.update(stacking.stack(grads), stacking.stack(params), state, step)
        for key, value in state.items():
            stacking.unstack(value, [s[key] for s in states])
        if direction is not None:
            self.move(params, list(direction.unbind(0)), step)

    def move(self, params: list[Tensor], directions: list[Tensor | None], step: Step) -> None:
        """Decay and move ``params`` in place; those whose direction is ``None`` stay."""
        busy = [i for i, d in enumerate(directions) if d is not None]
        if not busy:
            return
        moving = params if len(busy) == len(params) else [params[i] for i in busy]
        along = [directions[i] for i in busy]
        if step.weight_decay and not self.decay_after:
            torch._foreach_mul_(moving, 1 - step.lr * step.weight_decay)
        torch._foreach_add_(moving, along, alpha=-step.lr)  # type: ignore[arg-type]
        if step.weight_decay and self.decay_after:
            torch._foreach_mul_(moving, 1 - step.lr * step.weight_decay)


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
    state_dtype: Literal["fp32", "bf16"] | None = None, check_finite: bool = True,
) -> Optimizer:  # fmt: skip
    """The optimizer of a model's trainable parameters, grouped by :func:`metier.core.groups.roles`.

    ``attached`` is accepted for rules that pair up adapter factors. ``lr`` is the learning rate of the rule;
    where it hands a role to another rule, that one gets ``lr`` times the ratio of the two rules' defaults;
    ``groups`` can set it apart. ``check_finite``: as in :class:`Optimizer`.
    """
    rule: Rule = built.obj
    peak = default_lr(rule) if lr is None else lr
    lr_of = {r: peak * default_lr(rule.for_role(r)) / default_lr(rule) for r in grouping.ROLES}
    split = grouping.split(model, lr=lr_of, weight_decay=weight_decay, groups=groups)
    if not split:
        raise UsageError("no parameter is trainable")
    return Optimizer(split, rule, lr=peak, weight_decay=weight_decay, state_dtype=state_dtype, check_finite=check_finite)
