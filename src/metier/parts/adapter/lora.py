"""LoRA: a trainable low-rank update beside a frozen weight (arXiv:2106.09685, section 4.1)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metier.core.adapt import LinearAdapter
from metier.core.lowrank import low_rank_linear
from metier.core.part import Count, Fraction, Positive, part

PLAIN = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "fan_in_fan_out", "modules_to_save",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "peft_type", "task_type",
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "megatron_core",
    "runtime_config",
}  # fmt: skip
"""Fields of PEFT's configuration that this part expresses, that choose targets, or that change nothing."""


@part("adapter/lora", paper="arXiv:2106.09685")
class LoRA(LinearAdapter):
    """``y = x Wᵀ + s (x Aᵀ) Bᵀ`` with ``A [r, in]``, ``B [out, r]`` and ``W`` frozen.

    ``s = alpha / r``, or ``alpha / sqrt(r)`` with ``rslora`` (arXiv:2312.03732), which keeps the size of the
    update independent of the rank. ``alpha`` defaults to ``rank``, so that ``s = 1``. ``A`` starts uniform in
    ``±1/sqrt(in)`` and ``B`` at zero: the first output is the base's. ``dropout`` acts on the input of ``A``.
    """

    peft_names = {"down": "lora_A.weight", "up": "lora_B.weight"}

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: Count = 16,
        alpha: Positive | None = None,
        dropout: Fraction = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__(base)
        self.rank, self.rslora, self.dropout = rank, rslora, dropout
        self.alpha = float(rank if alpha is None else alpha)
        self.scale = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.down = self.trainable(nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5)))
        self.up = self.trainable(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]`` in the base's type."""
        if self._fuses(x):
            return low_rank_linear(x, self.base.weight, self.base.bias, self.down, self.up, self.scale)
        y = self.base(x)
        inside = self.scale * F.linear(F.dropout(self.cast(x), self.dropout, self.training), self.down)
        if inside.dtype == y.dtype:  # one pass over y instead of two
            return torch.addmm(y.flatten(0, -2), inside.flatten(0, -2), self.up.T).view_as(y)
        return y + F.linear(inside, self.up).to(y.dtype)

    def _fuses(self, x: Tensor) -> bool:
        """Whether base and update can be computed together: a plain frozen layer without hooks, one type, no dropout."""
        base = self.base
        plain = type(base) is nn.Linear and not (base._forward_hooks or base._forward_pre_hooks or base.weight.requires_grad)
        one_type = x.dtype == base.weight.dtype == self.down.dtype and not torch.is_autocast_enabled(x.device.type)
        return plain and one_type and not (self.dropout and self.training)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """``W + s B A`` and the base's bias."""
        return self.base.weight + self.scale * (self.up @ self.down), self.base.bias

    def pair(self) -> tuple[Tensor, Tensor]:
        """``(A, B)``."""
        return self.down, self.up

    def peft_config(self) -> dict[str, Any]:
        """The same adapter in PEFT's words."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Options of a plain PEFT LoRA; ``None`` for variants (DoRA, rank patterns, trained biases, changed
        bases)."""
        from peft import LoraConfig

        usual = LoraConfig().to_dict()
        plain = all(key in PLAIN or not value or value == usual.get(key) for key, value in config.items())
        if not plain or config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            return None
        return {
            "rank": config["r"],
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config.get("lora_dropout", 0)),
            "rslora": bool(config.get("use_rslora", False)),
        }
