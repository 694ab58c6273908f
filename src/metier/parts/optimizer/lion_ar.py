"""LionAR (Kosson, Messmer & Jaggi 2024): every weight row turns by a given angle and keeps its length."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metier.core import stacking
from metier.core.errors import UsageError
from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, Count, part
from metier.parts.optimizer import _rows as rows
from metier.parts.optimizer._snr import averages, multiplier
from metier.parts.optimizer.lion_a import LionA, kappa, signs


@part(
    "optimizer/lion-ar",
    paper="arXiv:2410.23922",
    rows=(5, 16),
    claim=Claim(
        text="without warmup LionAR ends below AdamW: its angles are right from the first step",
        metric="eval_loss",
        against="optimizer/adamw",
        figure="GPT2-124M: the gap without warmup shrinks, and closes with beta 0.98, Nesterov and inverse bias correction",
    ),
)
@dataclass(frozen=True, kw_only=True)
class LionAR(Rule):
    """Sign momentum that turns each row by the same small angle and never changes its length.

    With c and κ of ``optimizer/lion-a``, ρ the length of a row at the start: ``d = sign(c)``; ``zero_mean`` takes off its
    mean (and that of w); ``projection`` its part along w; ``w ← w - η_r ρ d/|d|``; ``w ← w ρ/|w|``: with projection
    w turns by ``atan(η_r)``. ``η_r = √(2 η_max λ κ) · η/η_max`` is the angle to which AdamW settles, so learning rate and
    weight decay are AdamW's, but **weight decay λ only sets the angle**. ``angular_schedule: sqrt``: ``√(2 η λ κ)``, AdamW's
    equilibrium under a schedule, with a much later cooldown. ``inverse_bias_correction``: η_r times ``1 - βᵗ``. For
    training without warmup the paper adds it, with β = 0.98 and ``nesterov``.

    ``norm_beta`` > 0: an average for |d| (debiased, of squares), so angles hold on average only; 0 is strict.
    ``per_neuron: false``: one length and angle per tensor. Rows are the first dimension, outputs in ``nn.Linear``;
    in transformers' ``Conv1D`` (GPT-2) outputs are columns: set it there.

    ``rrc_batch`` = B, the samples of a step: η_r of a tensor times ``√((1 + s/B)/(1 + s))``, s its batch signal-to-noise
    ratio (``rrc_beta``: decay of the averages that tell it), so that representations change as in pure noise. The first
    step, where signal and noise look alike, counts as all signal: ``1/√B``. B = 1 changes nothing.

    **Not turned but moved by LionA with its weight decay**: gains, biases; embeddings and head, tied or not, unless
    ``tables``; **tensors with weight decay 0, which sets no angle**; rows too short to turn. Scales that matter need gains.
    Rows of zeros stay; a tensor of zeros (LoRA's B) is refused.

    State: a tensor like the parameter, a number per row (two with ``norm_beta``), three with ``rrc_batch``. No code of the
    paper is public; the authors' earlier rotational optimizers have ``zero_mean: true, norm_beta: 0.9`` and ``sqrt``.
    """

    default_lr = 3e-4

    beta: Beta = 0.9
    nesterov: bool = False
    per_neuron: bool = True
    zero_mean: bool = False
    projection: bool = True
    norm_beta: Beta = 0.0
    angular_schedule: Literal["linear", "sqrt"] = "linear"
    inverse_bias_correction: bool = False
    rrc_batch: Count | None = None
    rrc_beta: Beta = 0.99
    tables: bool = False

    def beside(self) -> LionA:
        """LionA with the same momentum."""
        return LionA(beta=self.beta, nesterov=self.nesterov, inverse_bias_correction=self.inverse_bias_correction)

    def for_role(self, role: str) -> Rule:
        """Gains and biases, and unless ``tables`` embeddings and head, are LionA's."""
        return self.beside() if role == "rest" or (role in ("embeddings", "head") and not self.tables) else self

    def __post_init__(self) -> None:
        if self.rrc_batch and not self.beta:
            raise UsageError("beta = 0 with rrc_batch: without an average nothing tells signal from noise", where="lion-ar")

    def init(self, p: Tensor) -> State:
        """Momentum at zero; for what may turn, the length ρ of its rows ``[m, 1, …]``."""
        state = {"m": torch.zeros_like(p)}
        if p.ndim > 1 and p.numel() > (p.shape[0] if self.per_neuron else 1) * (1 + self.zero_mean):  # else no way to turn
            state["rho"] = rows.length(p.unsqueeze(0), self.per_neuron)[0]
            if self.norm_beta:
                state["d2"] = torch.zeros_like(state["rho"])
            if self.rrc_batch:
                state["stats"] = p.new_zeros(3)
        return state

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """Equal shapes turn together."""
        turn = [i for i, s in enumerate(states) if "rho" in s and step.weight_decay > 0]
        rest = [i for i in range(len(params)) if i not in set(turn)]
        if rest:
            some, slopes = [params[i] for i in rest], [grads[i] for i in rest]
            self.beside().apply(some, slopes, [states[i] for i in rest], step.only(rest))
        for same in stacking.buckets(turn, lambda i: params[i].shape, lambda i: params[i].numel()):
            some, slopes = [params[i] for i in same], [grads[i] for i in same]
            self._turn(some, slopes, [states[i] for i in same], step.only(same))

    def plain(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """The same, one tensor at a time."""
        for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
            self.apply([p], [g], [state], step.only([i]))

    def _turn(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        w, rho = stacking.stack(params), stacking.stack([s["rho"] for s in states])
        if step.t == 1:
            rows.refuse_zeros(rho, step)
        d = stacking.stack(signs(grads, [s["m"] for s in states], self.beta, self.nesterov))
        within, tiny = rows.axes(d, self.per_neuron), torch.finfo(d.dtype).tiny
        if self.zero_mean:
            d, w = d.sub_(d.mean(within, keepdim=True)), rows.centred(w, rho, self.per_neuron)
        if self.projection:
            d.addcmul_(w, (d * w).sum(within, keepdim=True) / rho.square().clamp(min=tiny), value=-1)
        size = self._size(d, states, step.t)
        angle = self._angle(step) * self._multiplier(grads, states, step.t)
        if step.lr:
            w = torch.addcmul(w, d, angle * rho / size.clamp(min=tiny), value=-1)
            w.mul_(rho / rows.length(w, self.per_neuron).clamp(min=tiny))
            torch._foreach_copy_(params, list(w.unbind(0)))

    def _angle(self, step: Step) -> float:
        """η_r in radians."""
        peak = step.peak or step.lr or 1.0
        shrunk = step.lr / peak if self.angular_schedule == "linear" else math.sqrt(step.lr / peak)
        grown = 1 - self.beta**step.t if self.inverse_bias_correction else 1.0
        return math.sqrt(2 * peak * step.weight_decay * kappa(self.beta)) * shrunk * grown

    def _size(self, d: Tensor, states: list[State], t: int) -> Tensor:
        """|d| of every row, or its average."""
        size = rows.length(d, self.per_neuron)
        if not self.norm_beta:
            return size
        mean = stacking.stack([s["d2"] for s in states]).lerp(size.square(), 1 - self.norm_beta)
        torch._foreach_copy_([s["d2"] for s in states], list(mean.unbind(0)))
        return (mean / (1 - self.norm_beta**t)).sqrt()

    def _multiplier(self, grads: list[Tensor], states: list[State], t: int) -> Tensor | float:
        """c of every tensor, ``[k, 1, …]``."""
        if not self.rrc_batch:
            return 1.0
        stats = averages([s["stats"] for s in states], grads, [s["m"] for s in states], self.beta, self.rrc_beta, t)
        return multiplier(stats, self.rrc_batch).reshape(-1, *[1] * grads[0].ndim)
