"""Multi-token prediction: chained extra blocks predict the tokens after the next one (DeepSeek-V3, arXiv:2412.19437,
section 2.2), and can draft for the model they were trained with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import aux, forward, models
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.normed import Norm
from metier.core.part import Count, Fraction, NonNegative, part
from metier.core.scores import linear_logps
from metier.parts.model._drafting import speculate

__all__ = ["MultiTokenPrediction", "speculate"]


@part("model/multi-token-prediction", paper="arXiv:2412.19437", rows=(12,))
class MultiTokenPrediction:
    """Chained extra blocks predict the tokens after the next one, in training only, and can draft for the model.

    Depth ``k = 1 … depth`` predicts ``x_{t+k+1}``: ``h'ᵏ_t = M_k [RMSNorm(Emb(x_{t+k})); RMSNorm(hᵏ⁻¹_t)]``,
    ``hᵏ = Block_k(h'ᵏ)``, logits ``Head(RMSNorm(hᵏ))``; the loss grows by ``weight / depth · Σ_k CE_k`` (metric ``mtp``). ``h⁰``
    is the backbone's last hidden state; embedding and head are the model's, and gradients flow into all of them. ``Block_k``
    starts as a copy of the last block, ``M_k [D, 2D]`` from N(0, initializer_range²); the order of its inputs is that of the
    release (the report has the other). From the fraction ``late_from`` of the run on the weight is ``late_weight``.

    A prediction counts when its target carries loss and the tokens from ``t`` to it are one sequence. Evaluation and generation
    see the model alone; its weights hold ``mtp.*``; ``speculate`` drafts with them. Costs one block and one pass of the head per
    depth. Changes the model in place, after parts that change blocks. Raises ``UsageError`` without full rotary attention.
    """

    def __init__(
        self, *, depth: Count = 1, weight: NonNegative = 0.3, late_weight: NonNegative = 0.1, late_from: Fraction = 2 / 3
    ) -> None:
        self.depth, self.weight, self.late_weight, self.late_from = depth, weight, late_weight, late_from

    def __call__(self, model: Any) -> Any:
        """The model with ``depth`` extra blocks under ``mtp``."""
        backbone, blocks = models.backbone(model), models.blocks(model)
        kinds = set(getattr(model.config, "layer_types", None) or ())
        sliding = kinds - {"full_attention"} or (not kinds and getattr(model.config, "sliding_window", None))
        if not hasattr(backbone, "rotary_emb") or not hasattr(blocks[-1], "self_attn") or sliding or hasattr(model, "mtp"):
            what = f"{type(model).__name__} takes no further blocks: it needs full attention with rotary positions"
            raise UsageError(what, where="model/multi-token-prediction")
        models.head(model)
        model.mtp = Depths([Depth(blocks[-1], model.config) for _ in range(self.depth)], self.weight)
        backbone.register_forward_hook(_Hook(model))
        return model

    def on_batch(self, ctx: Any, _: list[Layout]) -> None:
        """Set the weight of this step."""
        for module in ctx.model.modules():
            if isinstance(module, Depths):
                module.weight = self.late_weight if ctx.clock.progress >= self.late_from else self.weight


class Depth(nn.Module):
    """One extra block: ``(hᵏ⁻¹, Emb)`` -> ``hᵏ``, all ``[R, T, D]``."""

    def __init__(self, block: nn.Module, config: Any) -> None:
        super().__init__()
        like = next(p for p in block.parameters() if p.ndim == 2)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.norm = (Norm(d, 1, False, "shared", eps).to(like) for _ in range(3))
        self.eh_proj = nn.Linear(2 * d, d, bias=False).to(like)
        nn.init.normal_(self.eh_proj.weight, std=config.initializer_range)
        self.block = copy.deepcopy(block)

    def forward(self, h: Tensor, embedded: Tensor, angles: Any, mask: Tensor | None) -> Tensor:
        """``hᵏ``, before the norm in front of the head."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(h)], dim=-1))
        return self.block(x, attention_mask=mask, position_embeddings=angles)


class Depths(nn.Module):
    """All extra blocks, and the loss of their predictions."""

    def __init__(self, depths: list[Depth], weight: float) -> None:
        super().__init__()
        self.weight, self.count = weight, len(depths)
        for k, depth in enumerate(depths, 1):  # no ModuleList: a model's longest one is taken for its blocks
            self.add_module(str(k), depth)

    def losses(self, model: Any, layout: Layout, h: Tensor) -> list[Tensor]:
        """Mean loss of each depth; ``h [R, T, D]`` is the backbone's last hidden state."""
        embedded = models.embeddings(model)(layout.input_ids)
        angles = models.backbone(model).rotary_emb(h, position_ids=layout.position_ids)
        step = _Shifted(layout) if layout.plain else _Tree(layout, forward.masking(model, layout)["attention_mask"])
        found = []
        for k, depth in enumerate(self.children(), 1):
            h, e, mask = step.inputs(h, embedded, k)
            h = depth(h, e, angles, mask)
            col, keep = step.targets(k)
            at = depth.get_submodule("norm")(h[layout.row[keep], col[keep]])
            nll = -linear_logps(at, models.head(model), layout.target[keep], transform=models.logit_transform(model))
            nll = nll if layout.weight is None else nll * layout.weight[keep]
            found.append(nll.sum() / max(1, len(nll)))
        return found


class _Hook:
    """Adds the losses after the backbone's training pass. An object, so that a copied model calls its own copy."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, backbone: nn.Module, _: Any, output: Any) -> None:
        layout, mtp = aux.layout(), self.model.mtp
        if backbone.training and layout is not None:
            for loss in mtp.losses(self.model, layout, output.last_hidden_state):
                aux.add("mtp", loss, mtp.weight / mtp.count)


class _Shifted:
    """One sequence per row: column ``t`` stands for position ``t``. What wraps around lies behind all that counts."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def inputs(self, h: Tensor, embedded: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return h, embedded.roll(-k, dims=1), None

    def targets(self, k: int) -> tuple[Tensor, Tensor]:
        col = self.layout.col - k
        return col, col >= 0


class _Tree:
    """Several sequences per row: column ``j`` stands for the position ``k`` before it. A token has one predecessor, but
    several successors where answers share a prompt."""

    def __init__(self, layout: Layout, mask: Tensor) -> None:
        self.layout, self.mask = layout, mask
        seen, at = layout.visible().tril(-1), torch.arange(mask.shape[-1], device=mask.device)
        self.before = torch.where(seen, at, -1).amax(-1)
        self.valid = torch.ones_like(self.before, dtype=torch.bool)

    def inputs(self, h: Tensor, embedded: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        at, mask = self.before.clamp(min=0), self.mask
        self.valid = self.valid.gather(1, at) & (self.before >= 0)
        shown = self.valid[:, None, None, :] | torch.eye(at.shape[1], dtype=torch.bool, device=at.device)
        mask = mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, torch.finfo(mask.dtype).min)
        return h.gather(1, at.unsqueeze(-1).expand_as(h)), embedded, mask

    def targets(self, k: int) -> tuple[Tensor, Tensor]:
        return self.layout.col, self.valid[self.layout.row, self.layout.col]
