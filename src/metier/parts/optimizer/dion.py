"""Dion (Ahn et al. 2025): orthonormalized momentum by one power iteration, warm-started, at any rank."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from metier.core.linalg import gaussian, power_factors
from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, Count, NonNegative, part
from metier.parts.optimizer.adamw import AdamW
from metier.parts.optimizer.lion import Lion

LR = 0.01


class _AdamW(AdamW):
    default_lr = LR  # that of the matrices, so that all have the same


class _Lion(Lion):
    default_lr = LR


class _HeadLion(_Lion):
    """For an output layer ``[vocabulary, d]``: steps divided by √d."""

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        return super().update(g, p, state, step) / math.sqrt(p.shape[-1])


@part(
    "optimizer/dion",
    paper="arXiv:2504.05295",
    rows=(15,),
    claim=Claim(
        text="Dion at full rank ends below AdamW in language-model pre-training",
        metric="eval_loss",
        against="optimizer/adamw",
        minimum_effect=0.03,
        figure="3B: 2 to 3 times less wall-clock than AdamW to a target loss; rank 1/4 nearly equals full rank",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Dion(Rule):
    """Muon's kind of step by a low-rank factorisation of the momentum, with error feedback.

    For a weight ``[m, n]`` = fan-out × fan-in, momentum M = 0 and Q ``[n, r]`` Gaussian at the start: ``B = M + G``;
    ``P = orth(B Q)``; ``R = Bᵀ P`` (``power_iters`` times, with Q = R); ``M ← B - (1-μ) P Rᵀ``, so μ decays what the step
    captures and the rest waits; ``Q ← R`` with columns of length 1 (+ eps); direction ``√(m/n) P Qᵀ``. If m < n all this
    happens on the transpose, with the same √(fan-out/fan-in), which also makes learning rates carry over widths. No
    Nesterov, no bias correction; weight decay uses the learning rate without the factor. Columns of R that are rounding
    alone (directions in which the momentum is zero, as before a normalisation) become zero; the authors' code makes a step of
    noise there.

    ``r``: ``rank_fraction`` of the shorter side, rounded up, then up to ``rank_multiple_of``, at most that side. ``‖P Qᵀ‖_F =
    √r`` always; at full rank ``M ← μ (M + G)``. ``qr``: see :func:`metier.core.linalg.orthonormal`; the results agree; ``auto``
    is the fastest, ``householder`` on a CPU, ``cholesky`` elsewhere, whose fallback makes the authors' warm-up needless.
    ``error_feedback: false`` is the ablation ``M ← μ B``. ``scalar``: AdamW or Lion, both (0.9, 0.95), moves all the rest with
    the same base learning rate, under Lion an untied head with 1/√d of it.

    ``compressed``: for data-parallel runs whose gradients have *not* been averaged. Every process keeps an M of its own;
    only ``B Q`` and ``Bᵀ P`` are averaged, ``(m + n) r`` numbers. Weights and Q stay equal everywhere, and the mean of all M
    is that of one process with the mean gradient; :meth:`settle` before M is saved. Where the gradient is no larger, or
    at full rank, it is averaged itself. Gradients averaged before give the same, without the saving.

    State: ``mn + min(m, n) r``. Cost: four products of ``2mnr`` (three at full rank) and a QR, against Muon's 15 products.
    Split fused query-key-value weights. The authors' ``dion_simple`` never transposes and has rank 768; else both agree.
    """

    matrices = True
    default_lr = LR

    rank_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    rank_multiple_of: Count = 1
    mu: Beta = 0.95
    power_iters: Count = 1
    qr: Literal["auto", "householder", "cholesky", "randomized"] = "auto"
    eps: NonNegative = 1e-8
    error_feedback: bool = True
    scalar: Literal["adamw", "lion"] = "adamw"
    compressed: bool = False

    @property
    def local_gradients(self) -> bool:  # type: ignore[override]
        """Whether it averages over processes itself."""
        return self.compressed

    def for_role(self, role: str) -> Rule:
        """Itself for matrices, else the scalar rule."""
        if role == "matrices":
            return self
        if self.scalar == "adamw":
            return _AdamW(beta2=0.95)
        return (_HeadLion if role == "head" else _Lion)(beta2=0.95)

    def rank(self, m: int, n: int) -> int:
        """Columns of P and Q."""
        least = math.ceil(self.rank_fraction * min(m, n) - 1e-9)
        return min(-(-least // self.rank_multiple_of) * self.rank_multiple_of, m, n)

    def init(self, p: Tensor) -> State:
        """Momentum at zero; Q the same for every matrix of one shape, hence on all replicas."""
        return {"m": torch.zeros_like(p), "q": gaussian((min(p.shape), self.rank(*p.shape)), like=p)}

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """On a CPU one by one, which copies nothing and stays in the cache; in stacks elsewhere."""
        (self.plain if params[0].device.type == "cpu" else super().apply)(params, grads, states, step)

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above, for a stack ``[k, m, n]``."""
        rows, cols = g.shape[-2:]
        small = state["q"].shape[-1] < min(rows, cols) and (rows + cols) * state["q"].shape[-1] < rows * cols
        m = state["m"].add_(g if small else self._mean(g))
        b = m.mT if rows < cols else m
        mean = self._mean if small else lambda x: x
        left, r, unit = power_factors(b, state["q"], iterations=self.power_iters, qr=self.qr, eps=self.eps, mean=mean)
        if self.error_feedback and r.shape[-1] < b.shape[-1]:
            b.baddbmm_(left, r.mT, alpha=self.mu - 1)
        else:  # At full rank P Rᵀ is B.
            b.mul_(self.mu)
        state["q"].copy_(unit)
        direction = torch.baddbmm(b, left, unit.mT, beta=0, alpha=math.sqrt(rows / cols))
        return direction.mT if rows < cols else direction

    def settle(self, states: list[State]) -> None:
        """Replace each process's momentum by the mean of all, as a checkpoint or another world size needs it."""
        for state in states:
            state["m"].copy_(self._mean(state["m"]))

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over all processes when compressing, else ``x``."""
        distributed = torch.distributed
        if not (self.compressed and distributed.is_available() and distributed.is_initialized()):
            return x
        total = x.contiguous().clone()
        distributed.all_reduce(total)
        return total / distributed.get_world_size()
