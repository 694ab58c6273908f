"""MARS (Yuan et al. 2024, ICML 2025): a variance-reduced gradient under AdamW, Lion or an orthogonalized step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metier.core import stacking
from metier.core.linalg import orthogonalize
from metier.core.optim import Rule, State, Step
from metier.core.part import Beta, Claim, NonNegative, Positive, part
from metier.parts.optimizer.adamw import AdamW

RATES = {"adamw": 3e-3, "lion": 3e-4, "shampoo": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Vectors(AdamW):
    """AdamW beside MARS, with a learning rate in proportion to it."""

    default_lr: float = RATES["adamw"]  # type: ignore[misc]


@part(
    "optimizer/mars",
    paper="arXiv:2411.10438",
    rows=(8,),
    claim=Claim(
        text="MARS reaches a lower validation loss than AdamW at equal tokens",
        metric="eval_loss",
        against="optimizer/adamw",
        minimum_effect=0.02,
        figure="GPT-2 small, OpenWebText, 50B tokens: AdamW 2.885, MARS 2.849; large: 2.561, 2.518",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Mars(AdamW):
    """A gradient that is pushed along its change since the last step, clipped, and then averaged.

    ``c = g + γ β₁/(1-β₁) (g - g_last)``, with ``clip``: ``c ← c / max(1, ‖c‖₂)`` over the whole tensor (every tensor
    for itself), ``m ← β₁ m + (1-β₁) c``. ``g_last`` is the gradient of the last step, on the last batch: the paper's
    approximate form, which costs no second pass; ``optimizer/mars-exact`` is the other. Then, by ``base``:

    - ``adamw``: ``v ← β₂ v + (1-β₂) c²``, direction ``(m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)``
    - ``lion``: direction ``sign(m)`` (that is Signum, not Lion: one average for direction and state)
    - ``shampoo``: direction ``√max(1, rows/cols) · NS(m / (1-β₁))``, five iterations in ``precision`` (released: bf16)

    Embeddings and head are matrices like all others, as in the release. Tensors of other than two dimensions are moved by
    AdamW with ``betas_1d`` and ``lr_1d`` times the learning rate, unless ``optimize_1d`` gives them to MARS (``shampoo``
    then moves them as ``adamw``). Gains and biases have no weight decay; the authors' is ``groups: {rest: {weight_decay: 0.1}}``.

    ``first_step``: ``zero`` takes ``g_last = 0``, as released, so ``c₁ = (1 + γ β₁/(1-β₁)) g₁``; ``self`` takes
    ``c₁ = g₁``, as in theory. ``second_moment: raw`` builds v from g, as a formula of the authors' README has it; their
    code, behind the figures, uses the clipped c. ``gamma: 0`` is AdamW with the clip alone, a control for it.

    State: m, v and the last gradient (three tensors like the parameter), without v for ``lion`` and matrices under
    ``shampoo``. The last gradient is a copy and is saved: gradients may be reused in place, runs resumed; the release
    keeps a reference. The clip takes the norm of a whole tensor: sharded ones are gathered (not with ``clip: false``,
    except under ``shampoo``). A step takes 0.8 to 1.2 times torch's foreach AdamW, ``shampoo`` as long as Muon.
    """

    beta1: Beta = 0.95
    beta2: Beta = 0.99
    base: Literal["adamw", "lion", "shampoo"] = "adamw"
    gamma: NonNegative = 0.025
    clip: bool = True
    optimize_1d: bool = False
    lr_1d: Positive = 0.5
    betas_1d: tuple[Beta, Beta] = (0.9, 0.95)
    first_step: Literal["zero", "self"] = "zero"
    second_moment: Literal["corrected", "raw"] = "corrected"
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Neither a norm nor a product of the whole tensor is needed."""
        return not self.clip and self.base != "shampoo"

    @property
    def default_lr(self) -> float:  # type: ignore[override]
        """3e-3 for ``adamw`` (the release's default), 3e-4 for ``lion``, 0.02 for ``shampoo``."""
        return RATES[self.base]

    def for_role(self, role: str) -> Rule:
        """AdamW for what is not a matrix, unless ``optimize_1d``."""
        if self.optimize_1d or role not in ("tensors", "rest"):
            return self
        first, second = self.betas_1d
        return Vectors(beta1=first, beta2=second, eps=self.eps, default_lr=self.default_lr * self.lr_1d)

    def init(self, p: Tensor) -> State:
        """Moments (v where the base needs it) and last gradient at zero."""
        alone = self.base == "lion" or (self.base == "shampoo" and p.ndim == 2)
        moments = {"m": torch.zeros_like(p)} if alone else super().init(p)
        return {**moments, "last": torch.zeros_like(p)}

    def update(self, g: Tensor, p: Tensor, state: State, step: Step) -> Tensor:
        """The direction above."""
        (c,) = self.corrected([g], [state["last"]], step.t)
        (direction,) = self.directions([g], [c], [state], step.t)
        state["last"].copy_(g)
        return direction

    def apply(self, params: list[Tensor], grads: list[Tensor], states: list[State], step: Step) -> None:
        """The whole list by torch's kernels for lists; matrices of one shape are orthogonalized together."""
        last = [s["last"] for s in states]
        self.advance(params, grads, self.corrected(grads, last, step.t), states, step)
        torch._foreach_copy_(last, grads)

    def corrected(self, grads: list[Tensor], last: list[Tensor], t: int) -> list[Tensor]:
        """``c`` of every tensor, written over ``last``: in one pass, from there towards g and beyond."""
        if t == 1 and self.first_step == "self":
            torch._foreach_copy_(last, grads)
        torch._foreach_lerp_(last, grads, 1 + self.gamma * self.beta1 / (1 - self.beta1))
        if self.clip:
            norms = torch._foreach_norm(last)
            torch._foreach_clamp_min_(norms, 1.0)
            torch._foreach_div_(last, norms)
        return last

    def advance(self, params: list[Tensor], grads: list[Tensor], corrected: list[Tensor], states: list, step: Step) -> None:
        """Move ``params`` in place, given the corrected gradients."""
        if self.base == "adamw" and self.second_moment == "corrected":
            super().apply(params, corrected, states, step)
        else:
            self.move(params, list(self.directions(grads, corrected, states, step.t)), step)

    def directions(self, grads: list[Tensor], corrected: list[Tensor], states: list[State], t: int) -> list[Tensor]:
        """Where every tensor goes; its moments are updated."""
        m = [s["m"] for s in states]
        torch._foreach_lerp_(m, corrected, 1 - self.beta1)
        if self.base == "lion":
            return list(torch._foreach_sign(m))
        squared = grads if self.second_moment == "raw" else corrected
        found = {i: self._adaptive(squared[i], s, t) for i, s in enumerate(states) if "v" in s}
        matrices = [i for i in range(len(m)) if i not in found]
        for rows in stacking.buckets(matrices, lambda i: m[i].shape, lambda i: m[i].numel()):
            found.update(zip(rows, self._orthogonal([m[i] for i in rows]), strict=True))
        return [found[i] for i in range(len(m))]

    def _adaptive(self, g: Tensor, state: State, t: int) -> Tensor:
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        return state["m"].div(1 - self.beta1**t).div_(v.div(1 - self.beta2**t).sqrt_().add_(self.eps))

    def _orthogonal(self, m: list[Tensor]) -> Tensor:
        x = stacking.stack(m) / (1 - self.beta1)
        x = x.bfloat16() if self.precision == "bf16" else x
        return orthogonalize(x, steps=5).to(m[0].dtype) * math.sqrt(max(1, x.shape[-2] / x.shape[-1]))
