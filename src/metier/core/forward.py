"""One forward pass of the backbone over a layout: embeddings, positions, mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import models
from metier.core.errors import UsageError
from metier.core.layout import Layout

Embed = Callable[[Tensor], Tensor]


def hidden_states(model: nn.Module, layout: Layout, *, embed: Embed | None = None) -> Tensor:
    """Last hidden states ``[R, T, D]``; ``embed`` maps the token embeddings ``[R, T, D]`` before the first block."""
    inputs = {**tokens(model, layout, embed), **masking(model, layout), **extra(model, layout)}
    return models.backbone(model)(**inputs, use_cache=False).last_hidden_state


def tokens(model: nn.Module, layout: Layout, embed: Embed | None = None) -> dict[str, Tensor]:
    """The tokens as ids, or as mapped embeddings."""
    if embed is None:
        return {"input_ids": layout.input_ids}
    return {"inputs_embeds": embed(models.embeddings(model)(layout.input_ids))}


def extra(model: Any, layout: Layout) -> dict[str, Tensor]:
    """Further inputs that this model takes: segment ids only where it has segment embeddings."""
    segments = (getattr(model.config, "type_vocab_size", None) or 0) > 1
    return {k: v for k, v in layout.extra.items() if k != "token_type_ids" or segments}


def masking(model: Any, layout: Layout) -> dict[str, Any]:
    """Attention mask and positions. A plain layout of a causal model needs neither: padding is on the right.

    Raises ``UsageError`` when several sequences share a row and the model cannot keep them apart.
    """
    if not is_causal(model):
        if not layout.plain:
            raise UsageError(
                f"{model.config.model_type} cannot take several sequences in a row",
                hint="Set data.packed: false.",
            )
        return {"attention_mask": (layout.group > 0).long()}
    if layout.plain:
        return {}
    kinds = _layer_kinds(model.config)
    visible = layout.visible().unsqueeze(1)
    full = _for_attention(model, visible)
    if "sliding_attention" not in kinds:
        return {"attention_mask": full, "position_ids": layout.position_ids}
    near = _for_attention(model, visible & _near(model.config, layout))
    both = {"full_attention": full, "sliding_attention": near}
    return {"attention_mask": both if len(kinds) > 1 else near, "position_ids": layout.position_ids}


def is_causal(model: Any) -> bool:
    """Whether each position of the model sees earlier ones only."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.config
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))


def _layer_kinds(config: Any) -> set[str]:
    """The kinds of attention in the model, refusing those that carry a state from one sequence to the next."""
    kinds: set[str] = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"sliding_attention" if _window(config) else "full_attention"}
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise UsageError(
            f"{config.model_type} has {', '.join(sorted(strange))} layers, which cannot keep apart several sequences in a row",
            hint="Set data.packed: false; comparing several answers to a prompt needs another model.",
        )  # fmt: skip
    return kinds


def _window(config: Any) -> int | None:
    used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None


def _near(config: Any, layout: Layout) -> Tensor:
    """``[R, 1, T, T]``: is the distance, counted in the sequence and not in the row, inside the sliding window?"""
    window = getattr(config, "sliding_window", None)
    if window is None:
        raise UsageError(f"{config.model_type} has sliding-window layers of unknown width", hint="Set data.packed: false.")
    distance = layout.position_ids.unsqueeze(2) - layout.position_ids.unsqueeze(1)
    return (distance < window).unsqueeze(1)


def _for_attention(model: Any, visible: Tensor) -> Tensor:
    """The mask in the form that the model's attention takes: boolean for SDPA, additive for the plain one."""
    kind = getattr(model.config, "_attn_implementation", None) or "eager"
    if kind == "sdpa":
        return visible
    if kind != "eager":
        raise UsageError(f"attention {kind} takes no mask, which several sequences in a row need", hint="Use sdpa.")
    floating = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(visible.shape, dtype=floating, device=visible.device).masked_fill(~visible, torch.finfo(floating).min)
