"""SOAP (Vyas et al. 2024, arXiv:2409.11321, algorithm 3): Adam in the eigenbasis of Shampoo's factors."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metier.core import eigenbasis as eigen
from metier.core import stacking
from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, Count, Index, NonNegative, part

TOGETHER = 2**14
"""Elements of a tensor above which copying into a stack costs more than its calls save."""


@part(
    "optimizer/soap",
    paper="arXiv:2409.11321",
    rows=(4,),
    claim=Claim(
        text="At equal tokens SOAP ends below AdamW", metric="eval_loss", against="optimizer/adamw", minimum_effect=0.02,
        figure="360M and 660M, batches of 2M tokens: over 40% fewer iterations than AdamW to the same loss",
    ),
)  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class SOAP(Rule):
    """Adam in the slowly refreshed eigenbasis of the running averages of ``G Gᵀ`` and ``Gᵀ G``.

    Matrix ``[m, n]``, factors L ``[m, m]`` and R ``[n, n]`` with orthonormal eigenvectors ``Q_L``, ``Q_R``. The first step
    only makes these from the gradient: no weight moves. Then, at s = 1, 2, …: ``G' = Q_Lᵀ G Q_R``; ``m ← β₁ m + (1-β₁) G'``;
    ``v ← β₂ v + (1-β₂) G'²``; direction ``√(1-β₂ˢ)/(1-β₁ˢ) · Q_L (m / (√v + ε)) Q_Rᵀ``, weight decay after it;
    ``L ← β L + (1-β) G Gᵀ``, R likewise, with β = ``shampoo_beta`` (null: β₂). Every ``precondition_frequency`` = f steps a
    basis is refreshed: its columns and the entries of v are sorted by ``diag(Qᵀ L Q)``, ``Q ← QR(L Q)``, and m is turned
    into the new basis; v is not.

    ``max_precond_dim``: longer axes are not rotated (0: Adam, one step late). ``one_sided``: only the shortest axis (ties: the
    last). ``factorized``: ``v = A Cᵀ/ΣA``, averages of row and column sums, over the last two axes. ``normalize_grads``:
    direction of RMS 1 (helps at f near 100, hurts at 10). ``precondition_1d``: vectors too. ``merge_dims``: fuse neighbouring
    axes up to ``max_precond_dim``; else one factor per axis. ``spread``: each tensor and side has its own of the f steps, by
    its name, so that no step refreshes everything (nameless tensors share one); false: all when f divides s.

    State: ``2mn + 2m² + 2n²`` numbers, ``one_sided`` ``2mn + 2 min²``, ``factorized`` ``m + n`` instead of one mn; L and R are
    valid on and above the diagonal. Cost: ``2.6 mn(m+n)`` multiply-adds a step and ``O(m³+n³)/f``; sharded tensors are gathered.

    Unlike the released code: only the shorter axis of embeddings and head is rotated (its limit of 10000 is meant to leave
    vocabularies out, and misses small ones; ``rotate_vocabulary`` restores it); refreshes are spread; axes of length 1 have
    no factor. While gradients have not filled L, its null space has an arbitrary basis, and rounding shows in the weights.
    """

    decay_after = True
    default_lr = 3e-3

    beta1: Beta = 0.95
    beta2: Beta = 0.95
    shampoo_beta: Beta | None = None
    eps: NonNegative = 1e-8
    precondition_frequency: Count = 10
    max_precond_dim: Index = 10000
    merge_dims: bool = False
    precondition_1d: bool = False
    normalize_grads: bool = False
    correct_bias: bool = True
    one_sided: bool = False
    factorized: bool = False
    spread: bool = True
    rotate_vocabulary: bool = False

    def for_role(self, role: str) -> Rule:
        """Only the shorter axis of embeddings and head, unless ``rotate_vocabulary``."""
        return replace(self, one_sided=True) if role in ("embeddings", "head") and not self.rotate_vocabulary else self

    def _folded(self, shape: torch.Size) -> tuple[int, ...]:
        return eigen.fused(shape, self.max_precond_dim) if self.merge_dims and len(shape) > 1 else tuple(shape)

    def _axes(self, shape: torch.Size) -> list[int]:
        """Axes of :meth:`_folded` with a factor."""
        if len(shape) < 2 and not self.precondition_1d:
            return []
        found = [(d, -a) for a, d in enumerate(self._folded(shape)) if d > 1]
        chosen = [min(found)] if self.one_sided and found else found
        return [-a for d, a in chosen if d <= self.max_precond_dim]

    def init(self, p: Tensor) -> State:
        """m and v (or ``row``, ``col``), and of every rotated axis ``moment`` and ``basis``; all zero."""
        shape, axes = self._folded(p.shape), self._axes(p.shape)
        second = {"row": shape[:-1], "col": shape[:-2] + shape[-1:]} if self.factorized and len(shape) > 1 else {"v": p.shape}
        # Flat: of another shape than the parameter, or the core would store them in low precision.
        flat = {f"{key}{a}": (shape[a] ** 2,) for a in axes for key in ("moment", "basis")}
        return {key: p.new_zeros(size) for key, size in {"m": p.shape, **second, **flat}.items()}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor | None:
        """The direction above; ``None`` at the first step."""
        direction = self._stack(g.unsqueeze(0), {key: value.unsqueeze(0) for key, value in state.items()}, step)
        return None if direction is None else direction[0]

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """Small tensors of equal shape in one stack."""
        key = [(p.shape, i if p.numel() > TOGETHER else -1) for i, p in enumerate(params)]
        for rows in stacking.buckets(range(len(params)), key.__getitem__, lambda i: params[i].numel()):
            kept, some = [states[i] for i in rows], step.only(rows)
            state = {name: stacking.stack([s[name] for s in kept]) for name in kept[0]}
            direction = self._stack(stacking.stack([grads[i] for i in rows]), state, some)
            for name, value in state.items():
                stacking.unstack(value, [s[name] for s in kept])
            if direction is not None:
                self.move([params[i] for i in rows], list(direction.unbind(0)), some)

    def _stack(self, g: Tensor, state: State, step: Step) -> Tensor | None:
        """The direction of a stack ``[k, …]`` with its state, ``None`` at the first step."""
        axes, s = self._axes(g.shape[1:]), step.t - 1
        x = g.reshape(len(g), *self._folded(g.shape[1:]))
        square = {a: (len(g), x.shape[a + 1], x.shape[a + 1]) for a in axes}
        moments, bases = ({a: state[f"{key}{a}"].view(square[a]) for a in axes} for key in ("moment", "basis"))
        state = {key: value.view(x.shape) if key in ("m", "v") else value for key, value in state.items()}
        direction = self._direction(x, bases, state, s).view(g.shape) if s else None
        for a in axes:
            slopes = eigen.unfolded(x, a)
            eigen.add_moment_(moments[a], slopes, 1 - (self.beta2 if self.shampoo_beta is None else self.shampoo_beta))
            if not s:
                bases[a].copy_(eigen.eigenbasis(moments[a], slopes))
            elif rows := eigen.due(step.names or ("",) * len(g), a, s, self.precondition_frequency, self.spread):
                eigen.renew_(moments[a], bases[a], a, rows, state["m"], _placed(state, a))
        return direction

    def _direction(self, x: Tensor, bases: dict[int, Tensor], state: State, s: int) -> Tensor:
        turned = x
        for a, basis in bases.items():
            turned = eigen.rotate(turned, basis, a)
        u = state["m"].lerp_(turned, 1 - self.beta1) / self._root(turned, state).add_(self.eps)
        for a, basis in bases.items():
            u = eigen.rotate(u, basis, a, back=True)
        if self.normalize_grads:
            u = u / (u.flatten(1).square().mean(1).sqrt() + 1e-30).view(-1, *[1] * (u.ndim - 1))
        return u * (math.sqrt(1 - self.beta2**s) / (1 - self.beta1**s)) if self.correct_bias else u

    def _root(self, x: Tensor, state: State) -> Tensor:
        """Root of the second moment, with x taken in."""
        if "v" in state:
            return state["v"].mul_(self.beta2).addcmul_(x, x, value=1 - self.beta2).sqrt()
        row, col = (state[key].lerp_(x.square().sum(d), 1 - self.beta2) for key, d in (("row", -1), ("col", -2)))
        return (row / row.sum(-1, keepdim=True).clamp(min=1e-30)).sqrt().unsqueeze(-1) * col.sqrt().unsqueeze(-2)


def _placed(state: State, axis: int) -> list[tuple[Tensor, int]]:
    """What is only put in the new order when ``axis`` is refreshed, and along which of its own axes."""
    last = state["m"].ndim - 2
    of = {"v": axis, "row": None if axis == last else axis, "col": None if axis == last - 1 else min(axis, last - 1)}
    return [(state[key], along) for key, along in of.items() if key in state and along is not None]
