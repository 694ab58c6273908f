"""ASGO (An et al. 2025): momentum times the inverse root of an average of ``G Gᵀ`` on the shorter side."""

import math
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from metier.core.errors import UsageError
from metier.core.linalg import inverse_root
from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, Count, NonNegative, Positive, part
from metier.parts.optimizer.adamw import AdamW

RMS = 0.2
"""Size of an entry of AdamW's update."""


def rescaled(direction: Tensor) -> Tensor:
    """``[k, m, n]`` with a root mean square of 0.2 in every matrix; zero stays zero."""
    largest = direction.abs().amax((-2, -1), keepdim=True)
    unit = direction / torch.where(largest > 0, largest, 1.0)
    size = torch.linalg.matrix_norm(unit, keepdim=True)
    return unit * (RMS * math.sqrt(direction[0].numel()) / torch.where(size > 0, size, 1.0))


@part(
    "optimizer/asgo",
    paper="arXiv:2503.20762",
    rows=(13,),
    claim=Claim(
        text="ASGO ends below AdamW in language-model pre-training",
        metric="eval_loss",
        against="optimizer/adamw",
        minimum_effect=0.02,
        figure="GPT-2 pre-training and GPT2-Large fine-tuning: direction only, no loss values found",
    ),
)
@dataclass(frozen=True, kw_only=True)
class ASGO(Rule):
    """One-sided Shampoo with momentum: full-matrix adaptivity on the shorter side of a matrix, at about Muon's cost.

    For a matrix ``[m, n]`` with ``m < n``: ``M ← β₁ M + (1-β₁) G``, ``V ← β₂ V + (1-β₂) G Gᵀ``, ``U = V^(-1/2) M``,
    direction ``0.2 √(mn) U / ‖U‖_F``; otherwise from the right with ``Gᵀ G``. The last factor (``rescale``) makes entries
    as large as AdamW's, so AdamW's learning rates carry over and no bias correction is needed. Without it steps are
    those of an orthogonal matrix and the first are much larger than the later ones.

    ``root``: how ``V^(-1/2)`` is computed, see :func:`metier.core.linalg.inverse_root`. ``polar`` is what the authors'
    code does on a GPU, ``eigh`` the exact one and the fastest on a CPU. ``eps`` is relative to ``‖V‖_F``, so the
    direction does not change when gradients are scaled; the authors' iterations have it in the normalisation only.
    ``every``: steps from one root to the next, each matrix at its own turn (the first step computes all); the root is then
    kept, another ``min(m, n)²`` numbers. ``heads``: matrices whose name matches ``heads_of`` are cut into that
    many groups of rows, each with a V of its own (queries and keys, as the paper does; the released code does not).
    ``theory``: the analysed form without momentum: ``V ← V + G Gᵀ``, direction ``(V^(1/2) + eps I)^-1 G``, always by
    ``eigh``; ``beta1``, ``beta2``, ``rescale`` and ``root`` then do not count, eps is absolute.

    State: ``mn + min(m, n)²``. Cost: one Gram matrix, one root, one product. With ``β₁ = β₂ = 0`` the direction is the
    polar factor of G, Muon without momentum. β₂ = 0.8 forgets in five steps; Adam's values change the method.
    Embeddings, head and all that is not 2-D go to AdamW (0.9, 0.95) with the same learning rate; fused
    query-key-value weights should be split. The released code moves an untied head with ASGO too, by oversight.
    """

    matrices = True
    default_lr = AdamW.default_lr

    beta1: Beta = 0.9
    beta2: Beta = 0.8
    eps: Positive = 1e-10
    every: Count = 1
    root: Literal["eigh", "newton-schulz", "newton", "polar"] = "eigh"
    rescale: bool = True
    heads: Count | None = None
    heads_of: str = "*[qk]_proj*"
    theory: bool = False

    def beside(self) -> Rule:
        """AdamW with the authors' betas."""
        return AdamW(beta2=0.95)

    def init(self, p: Tensor) -> State:
        """Momentum and Gram matrix ``[heads, side, side]`` at zero; also the root when it is kept."""
        side = min(p.shape)
        state = {} if self.theory else {"m": torch.zeros_like(p)}
        state["v"] = p.new_zeros(1, side, side)
        if self.every > 1:
            state["root"] = torch.zeros_like(state["v"])
        return state

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """Matrices with heads and matrices without, each in stacks of equal shape."""
        for split in (False, True):
            rows = [i for i in range(len(params)) if self._split(step, i) == split]
            if rows:
                some, slopes, kept = ([x[i] for i in rows] for x in (params, grads, states))
                if split and step.t == 1:
                    for p, state in zip(some, kept, strict=True):
                        self._make_room(p, state)  # type: ignore[arg-type]
                super().apply(some, slopes, kept, step.only(rows))  # type: ignore[arg-type]

    def plain(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """Stacks of one."""
        for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
            self.apply([p], [g], [state], step.only([i]))

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above, for a stack ``[k, m, n]``."""
        heads = state["v"].shape[1]
        cut = g.unflatten(-2, (heads, -1))
        left = cut.shape[-2] < cut.shape[-1]
        gram = cut @ cut.mT if left else cut.mT @ cut
        v = state["v"].add_(gram) if self.theory else state["v"].lerp_(gram, 1 - self.beta2)
        root = self._refreshed(v, state, step)
        m = cut if self.theory else state["m"].lerp_(g, 1 - self.beta1).unflatten(-2, (heads, -1))
        direction = (root @ m if left else m @ root).flatten(-3, -2)
        return rescaled(direction) if self.rescale and not self.theory else direction

    def _refreshed(self, v: Tensor, state: State, step: Step) -> Tensor:
        """The roots ``[k, heads, side, side]``, computed for the matrices whose turn it is."""
        if self.every == 1:
            return self._root(v)
        names = step.names or ("",) * len(v)
        due = [i for i, n in enumerate(names) if step.t == 1 or (step.t + zlib.crc32(n.encode())) % self.every == 0]
        if due:
            state["root"][due] = self._root(v[due])
        return state["root"]

    def _root(self, v: Tensor) -> Tensor:
        return _plain_root(v, self.eps) if self.theory else inverse_root(v, method=self.root, eps=self.eps)

    def _split(self, step: Step, i: int) -> bool:
        return self.heads is not None and bool(step.names) and fnmatchcase(step.names[i], self.heads_of)

    def _make_room(self, p: Tensor, state: State) -> None:
        """Replace the state of a whole matrix, made when its name was not known, by that of its heads."""
        if p.shape[0] % self.heads:  # type: ignore[operator]
            raise UsageError(f"{p.shape[0]} rows cannot be cut into heads = {self.heads}", hint="See heads_of.")
        side = min(p.shape[0] // self.heads, p.shape[1])  # type: ignore[operator]
        for key in ("v", "root"):
            if key in state:
                state[key].resize_(self.heads, side, side).zero_()  # type: ignore[arg-type]


def _plain_root(v: Tensor, eps: NonNegative) -> Tensor:
    """``(V^(1/2) + eps I)^-1``, eigenvalues clamped at the precision of the largest."""
    values, vectors = torch.linalg.eigh(v)
    noise = torch.finfo(v.dtype).eps * values[..., -1:].clamp(min=0)
    return (vectors / (values.maximum(noise).sqrt() + eps).unsqueeze(-2)) @ vectors.mT
