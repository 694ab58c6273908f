"""Which implementation computes attention: ``train.attention``."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metier.core import models, segments
from metier.core.errors import UsageError
from metier.core.forward import FLEX, hidden_states, takes_groups
from metier.core.layout import Layout
from metier.core.scores import evaluating

NAMES = {"sdpa": "sdpa", "flex": FLEX, "eager": "eager", "segments": segments.NAME}
CLOSE = 0.05
"""Largest difference between two implementations, relative to the size of what they compute; bfloat16 needs 0.01 of it."""


def choose(
    model: Any, wanted: str, *, grouped: bool, watched: bool = False, notice: Callable[[str], None] = lambda text: None
) -> None:
    """Set the model's attention as ``train.attention`` says; the model is on its device.

    ``auto`` leaves what the model was loaded with, except for ``grouped`` rows: on CUDA, unless something ``watched`` reads
    the masks, flex attention is tried, forward and backward, and kept when it computes the same; elsewhere SDPA is called by
    segments where that pays. Raises ``UsageError`` when a named implementation cannot be set.
    """
    if wanted == "flex" and not on_cuda(model):
        notice(f"flex attention has no backward pass on this device: {model.config._attn_implementation} is used")
    elif wanted != "auto":
        if why := _set(model, NAMES[wanted]):
            raise UsageError(f"{model.config.model_type} cannot use {wanted} attention: {why}", where="train.attention")
    elif not grouped or takes_groups(model) is not None:
        return
    elif not on_cuda(model):
        if model.config._attn_implementation == "sdpa":
            _set(model, segments.NAME)
    elif not watched:
        before = model.config._attn_implementation
        if why := _set(model, FLEX) or _tried(model, before):
            _set(model, before)
            notice(f"attention {before} instead of flex: {why}")


def follow(model: Any, other: Any) -> None:
    """Give ``model`` the attention of ``other``, so that equal weights give equal scores; where it cannot, leave it."""
    wanted, before = other.config._attn_implementation, model.config._attn_implementation
    if wanted != before and _set(model, wanted):
        _set(model, before)


def on_cuda(model: Any) -> bool:
    """Whether the model is on an NVIDIA or ROCm device."""
    return next(model.parameters()).device.type == "cuda"


def _set(model: Any, name: str) -> str | None:
    """Set it; when that fails, why."""
    if name == FLEX and (rate := _dropout(model.config)):
        return f"it has no dropout of attention weights, and the model asks for {rate:g}"
    segments.register()
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, AttributeError) as e:
        return str(e).strip().splitlines()[0]
    return None if model.config._attn_implementation == name else "the model does not let it be set"


def _dropout(config: Any) -> float:
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(float(getattr(config, name, None) or 0.0) for name in names)


def _tried(model: Any, before: str) -> str | None:
    """Why flex attention, which is set, is not to be used: it fails, or computes something else than ``before``."""
    layout = _sample(model)
    try:
        one = _outcome(model, layout)
    except Exception as e:  # whatever a compiler may raise
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"
    _set(model, before)
    other = _outcome(model, layout)
    _set(model, FLEX)
    gap = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(one, other, strict=True))
    return None if gap <= CLOSE else f"it differs from {before} by {gap:.2g}"


def _outcome(model: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradient of their sum of squares with respect to the embeddings; none reaches the weights."""
    seen: list[Tensor] = []

    def embed(e: Tensor) -> Tensor:
        seen.append(e.detach().requires_grad_())
        return seen[0]

    with torch.enable_grad(), evaluating(model):
        h = hidden_states(model, layout, embed=embed)[layout.group > 0].float()
        (slope,) = torch.autograd.grad(h.square().sum(), seen)
    return h.detach(), slope.float()


def _sample(model: Any) -> Layout:
    """Two rows of groups, longer than a block of flex attention, one of them padded."""
    from metier.core.separate import sample_layout

    small, device = sample_layout(models.embeddings(model)), next(model.parameters()).device
    columns = small.group.shape[1]
    copies = -(-160 // columns)
    number = torch.arange(copies).repeat_interleave(columns) * int(small.group.max())
    wide = {
        name: getattr(small, name).repeat(2, copies) for name in ("input_ids", "position_ids", "branch")
    }  # fmt: skip
    group = small.group.repeat(2, copies) + number
    group[1, -columns:] = 0
    return replace(small, **wide, group=group).to(device)
