"""LoRA that starts aligned with the loss's steepest directions (Xu et al., AISTATS 2025, arXiv:2503.06982)."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metier.core.basegrad import top_singular
from metier.core.part import Count, Fraction, Positive, part
from metier.core.shards import opened
from metier.parts.adapter.lora import LoRA


@part("adapter/spectral-lora", paper="arXiv:2503.06982", rows=(14,))
class SpectralLoRA(LoRA):
    """``y = x Wᵀ + s (x Aᵀ Bᵀ - x A₀ᵀ B₀ᵀ)``, with ``A [r, in]``, ``B [out, r]`` trained from ``A₀``, ``B₀``.

    With ``-∂L/∂W = U Σ Vᵀ`` on ``batches`` steps of training data (evaluation mode, before the first step),

        B₀ = (start / √s) U_r D,   A₀ = (start / √s) D V_rᵀ,   D = I, or (Σ_r / σ₁)^½ with ``singular: sqrt``.

    So ``BᵀB = A Aᵀ`` (balanced), the product ``s B₀ A₀ = start² U_r D² V_rᵀ`` points downhill, and gradient flow need not
    first find these directions out of a random start, which takes a time ``ln(1/start) / σ₁``.

    ``compensate`` subtracts ``s B₀ A₀``: the first output is the base's, bit for bit. It is kept as two factors beside the
    frozen ``W``, not in it, so that ``W`` may be quantised or sharded and the adapter switched off exactly; this costs a
    second pass of rank r and ``r (in + out)`` numbers a layer. Saved in PEFT's format as a plain LoRA of rank 2r with the
    factors ``[A; A₀]``, ``[B, -B₀]`` and the same s; what is loaded from there computes the same, and trained further it is
    such a LoRA. Without compensation the first output moves by ``start²`` times the size of the layer's input: keep
    ``start`` small (1e-2 and less). ``dropout`` does not act on the compensation.

    ``directions: gaussian`` is the theory's other start, for comparison: independent normal entries, columns of B and rows
    of A with a norm of about ``start / √s``, no gradient. ``rank``, ``alpha`` (s = alpha / rank), ``rslora`` as in adapter/lora.

    Cost: ``batches`` backward passes, one float32 copy of the weights that are adapted, and one decomposition each
    (randomised where both sides are above 512). Optimizers like Adam move entries by the learning rate whatever their
    size, so the theory is nearest to SGD; with Adam only the directions matter. Directions beyond the smaller side of W,
    and a layer whose gradient is zero, start as LoRA does, with B = 0. Reconstructed from the paper's text, since no code
    of the authors is known; ours are ``(Σ / σ₁)^½`` in place of ``Σ^½``, because a gradient's scale is arbitrary, and the
    gradient of a few batches in place of the residual's.
    """

    peft_names = {"both_down": "lora_A.weight", "both_up": "lora_B.weight"}

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: Count = 16,
        alpha: Positive | None = None,
        dropout: Fraction = 0.0,
        rslora: bool = False,
        start: Positive = 0.1,
        singular: Literal["identity", "sqrt"] = "identity",
        directions: Literal["gradient", "gaussian"] = "gradient",
        compensate: bool = True,
        batches: Count = 8,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        self.size, self.singular, self.compensate = start / math.sqrt(self.scale), singular, compensate
        self.calibration = batches if directions == "gradient" else 0
        self.register_buffer("down0", torch.zeros_like(self.down, requires_grad=False))
        self.register_buffer("up0", torch.zeros_like(self.up, requires_grad=False))
        if directions == "gaussian":
            with torch.no_grad():
                for own, side in (("up", base.out_features), ("down", base.in_features)):
                    value = getattr(self, own)
                    value.copy_(self.size / math.sqrt(side) * torch.randn(value.shape, dtype=value.dtype))
                    getattr(self, f"{own}0").copy_(value * compensate)

    def start(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """Factors from the gradient ``[out, in]`` of the mean loss at W, and their copies for the compensation."""
        u, sigma, vt = top_singular(-gradient, self.rank)
        k = len(sigma)
        down = opened(self.down.detach(), whole=True).clone()
        up = down.new_zeros(self.base.out_features, self.rank)
        if float(sigma[0]) > 0:
            shape = torch.ones_like(sigma) if self.singular == "identity" else (sigma / sigma[0]).sqrt()
            up[:, :k] = self.size * u * shape
            down[:k] = self.size * shape[:, None] * vt
        return {"up": up, "down": down, **({"up0": up, "down0": down} if self.compensate else {})}

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the base's type."""
        y = super().forward(x)
        if not self.compensate:
            return y
        inside = self.scale * F.linear(self.cast(x), self.down0)
        if inside.dtype == y.dtype:  # one pass over y instead of two
            return torch.addmm(y.flatten(0, -2), inside.flatten(0, -2), self.up0.T, alpha=-1).view_as(y)
        return y - F.linear(inside, self.up0).to(y.dtype)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """``W + s (B A - B₀ A₀)`` and the base's bias."""
        return self.base.weight + self.scale * (self.up @ self.down - self.up0 @ self.down0), self.base.bias

    @property
    def _compensated(self) -> bool:
        return bool(self.down0.any())

    @property
    def both_down(self) -> Tensor:
        """``[A; A₀] [2r, in]``, or A alone while nothing is compensated."""
        return torch.cat([opened(self.down, whole=True), self.down0]) if self._compensated else self.down

    @property
    def both_up(self) -> Tensor:
        """``[B, -B₀] [out, 2r]``, or B alone while nothing is compensated."""
        return torch.cat([opened(self.up, whole=True), -self.up0], 1) if self._compensated else self.up

    def peft_config(self) -> dict[str, Any]:
        """A plain LoRA in PEFT's words; of twice the rank and alpha, for the same s, when compensated."""
        plain = super().peft_config()
        if not self._compensated:
            return plain
        alpha = self.scale * 2 * self.rank
        whole = int(alpha) if alpha.is_integer() else alpha
        return {**plain, "r": 2 * self.rank, "lora_alpha": whole, "use_rslora": False}
