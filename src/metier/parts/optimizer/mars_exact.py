"""MARS in its exact form (Yuan et al. 2024, algorithm 1): the last gradient is taken on this step's batch."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metier.core import shards, stacking
from metier.core.errors import MetierError, UsageError
from metier.core.optim import State, Step
from metier.core.part import Claim, Positive, part
from metier.parts.optimizer.mars import Mars


@part(
    "optimizer/mars-exact",
    paper="arXiv:2411.10438",
    rows=(8,),
    claim=Claim(
        text="the exact form of MARS ends slightly below its approximate form at equal steps",
        metric="eval_loss",
        against="optimizer/mars",
        figure="GPT-2 small, OpenWebText: 3.107 and 3.108 at 5B tokens, 2.847 and 2.849 at 50B",
    ),
    needs=("closure",),
)
@dataclass(frozen=True, kw_only=True)
class MarsExact(Mars):
    """MARS whose ``g_last`` is the gradient of this batch at the weights before the last step.

    Everything after ``g_last`` is ``optimizer/mars``, with its options. A step evaluates the batch at the weights x_t,
    swaps in the kept x_{t-1}, evaluates the same batch with the same randomness (dropout masks too: the training loop
    seeds all evaluations of a step equally), and puts x_t back bit for bit, also when an evaluation fails. The authors'
    loop gets the same two gradients in another order: before it steps on batch t it evaluates batch t + 1 at x_t and
    stashes that gradient for the next step. Both compare gradients of one batch at x_t and x_{t-1}, so the
    trajectories agree as long as randomness is tied to the batch; keeping weights instead of a gradient needs no look at
    the future batch (which under accumulation is many micro-batches), so resuming and the end of the data are ordinary.
    With ``γ = 1`` and no clip, m is STORM's: ``m_t = g_t(x_t) + β₁ (m_{t-1} - g_t(x_{t-1}))``.

    The first step has no weights before it: ``first_step`` decides as in ``optimizer/mars``, and one evaluation is
    enough. Tensors without a gradient stay. ``max_norm``: both gradients are first clipped to this norm over all tensors,
    as in the authors' loop; the training loop cannot clip between evaluations.

    Cost: two forward and backward passes a step, so half the steps at equal compute. State: m, v and the previous
    weights (in the parameter's own precision, whatever ``state_dtype``); during a step two more copies, the weights of
    now and their gradient. Not for sharded parameters.
    """

    max_norm: Positive | None = 1.0

    def init(self, p: Tensor) -> State:
        """Moments at zero, in float32 at least, and the weights ``[1, …]`` as those of the step before."""
        if shards.is_sharded(p):
            raise UsageError("optimizer/mars-exact does not move sharded parameters", hint="Use ddp, or optimizer/mars.")
        wide = p.detach().to(_compute(p))
        state = super().init(wide) if self._rule(p) is self else self._rule(p).init(wide)
        # Not in p's shape: such state is stored as it is, whatever state_dtype says.
        return {**{k: v for k, v in state.items() if k != "last"}, "previous": p.detach().clone().unsqueeze(0)}

    def step(
        self, closure: Callable[..., float], params: list[Tensor], states: list[State], *,
        lr: list[float], weight_decay: list[float], t: int,
    ) -> float:  # fmt: skip
        """One step; the loss before it. Raises ``MetierError`` for gradients that are not finite, with weights and state
        as they were.
        """
        previous = [s["previous"][0] for s in states]
        loss, grads = self._gradients(closure, params)
        last: list[Tensor | None] = [None] * len(params)
        if t > 1:
            with _at(params, previous):
                _, last = self._gradients(closure, params)
        torch._foreach_copy_(previous, params)
        ready = [i for i, g in enumerate(grads) if g is not None and g.numel()]
        kinds = [(p.device, p.dtype, a, w, self._rule(p) is self) for p, a, w in zip(params, lr, weight_decay, strict=True)]
        for rows in stacking.buckets(ready, lambda i: kinds[i], lambda i: params[i].numel()):
            some = [params[i] for i in rows], [grads[i] for i in rows], [last[i] for i in rows], [states[i] for i in rows]
            self._move(*some, Step(t=t, lr=lr[rows[0]], weight_decay=weight_decay[rows[0]]))
        return loss

    def _rule(self, p: Tensor) -> Any:
        return self.for_role("matrices" if p.ndim == 2 else "rest")

    def _gradients(self, closure: Callable[..., float], params: list[Tensor]) -> tuple[float, list[Tensor | None]]:
        """The loss and copies of all gradients, clipped together: their memory may be used again by the next pass."""
        loss = closure(backward=True)
        grads = [None if p.grad is None else p.grad.to(_compute(p), copy=True) for p in params]
        some = [g for g in grads if g is not None]
        if not some:
            return loss, grads
        norm = torch.stack([n.to(some[0].device, torch.float64) for n in torch._foreach_norm(some)]).norm().item()
        if not math.isfinite(norm):
            raise MetierError("a gradient is not finite; nothing has been changed")
        if self.max_norm is not None and norm > self.max_norm:
            torch._foreach_mul_(some, self.max_norm / (norm + 1e-6))
        return loss, grads

    def _move(self, params: list, grads: list, last: list, states: list[State], step: Step) -> None:
        """Move tensors of equal dtype by one rule, in the precision of the arithmetic."""
        compute = _compute(params[0])
        values = [p.to(compute) for p in params]
        opened = [{k: v.to(compute) for k, v in s.items() if k in ("m", "v")} for s in states]
        rule = self._rule(params[0])
        if rule is self:
            last = [torch.zeros_like(g) if x is None else x for g, x in zip(grads, last, strict=True)]
            self.advance(values, grads, self.corrected(grads, last, step.t), opened, step)
        else:
            rule.apply(values, grads, opened, step)
        for p, value, state, moved in zip(params, values, states, opened, strict=True):
            if value is not p:
                p.copy_(value)
            for key, moment in moved.items():
                if moment is not state[key]:
                    state[key].copy_(moment)


@contextmanager
def _at(params: list[Tensor], weights: list[Tensor]) -> Iterator[None]:
    """``params`` at other ``weights``; put back bit for bit, whatever happens."""
    now = [p.detach().clone() for p in params]
    try:
        torch._foreach_copy_(params, weights)
        yield
    finally:
        torch._foreach_copy_(params, now)


def _compute(p: Tensor) -> torch.dtype:
    return p.dtype if p.dtype == torch.float64 else torch.float32
