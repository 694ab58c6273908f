"""One forward pass of the backbone over a layout: embeddings, positions, mask."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metier.core import models, segments
from metier.core.errors import UsageError
from metier.core.layout import Layout

Embed = Callable[[Tensor], Tensor]
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers whose mask says all about who sees whom."""
FLEX = "flex_attention"


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
    if layout.plain:
        return {} if is_causal(model) else {"attention_mask": (layout.group > 0).long()}
    if why := takes_groups(model):
        raise UsageError(
            f"{model.config.model_type} cannot take several sequences in a row: {why}",
            hint="Set data.packed: false; for several answers to a prompt, data.prompt_once: false.",
        )
    kinds = _layer_kinds(model.config)
    masks = {kind: _mask(model, layout, _window(model.config) if kind == SLIDING else None) for kind in kinds}
    chosen = masks if len(kinds) > 1 else masks[next(iter(kinds))]
    return {"attention_mask": chosen, "position_ids": layout.position_ids}


def takes_groups(model: Any) -> str | None:
    """``None`` when the model can keep apart several sequences in a row, as far as it says; else why not, in words."""
    config = model.config
    kind = getattr(config, "_attn_implementation", None) or "eager"
    if not is_causal(model):
        return "its positions see what comes after them too"
    if strange := _layer_kinds(config) - {FULL, SLIDING}:
        return f"its {', '.join(sorted(strange))} layers take no such mask"
    if "position_ids" not in inspect.signature(models.backbone(model).forward).parameters:
        return "it takes no positions"
    if SLIDING in _layer_kinds(config) and _window(config) is None:
        return "its sliding-window layers are of unknown width"
    if local := _local(config):
        return f"its {local} counts along the row"
    return None if kind in ("sdpa", "eager", FLEX, segments.NAME) else f"attention {kind} takes no such mask"


def is_causal(model: Any) -> bool:
    """Whether each position of the model sees earlier ones only."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.config
    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))


def _layer_kinds(config: Any) -> set[str]:
    """The kinds of layers in the model, by transformers' names."""
    kinds: set[str] = set(getattr(config, "layer_types", None) or ())
    return kinds or {SLIDING if _window(config) else FULL}


def _window(config: Any) -> int | None:
    used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None


def _local(config: Any) -> str | None:
    """A setting by which attention is local in another way than by ``sliding_window``, such as GPT-Neo's ``window_size``."""
    names = (k for k, v in vars(config).items() if type(v) is int and not k.startswith(("_", "sliding", "max_")))
    return next((k for k in names if re.search(r"window(_|$)|attention_chunk", k) and "pattern" not in k), None)


def _mask(model: Any, layout: Layout, window: int | None) -> Any:
    """The mask in the form that the model's attention takes: boolean for SDPA, additive for the plain one, blocks for flex."""
    kind = getattr(model.config, "_attn_implementation", None) or "eager"
    if kind == FLEX:
        return block_mask(layout, window)
    visible = layout.visible()
    if window is not None:  # the distance counts in the sequence and not in the row
        visible = visible & (layout.position_ids.unsqueeze(2) - layout.position_ids.unsqueeze(1) < window)
    visible = visible.unsqueeze(1)
    if kind == segments.NAME:
        return segments.attach(visible, layout, window)
    if kind == "sdpa":
        return visible
    floating = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.zeros(visible.shape, dtype=floating, device=visible.device).masked_fill(~visible, torch.finfo(floating).min)


def block_mask(layout: Layout, window: int | None = None) -> Any:
    """What each token sees as flex attention's ``BlockMask``: blocks in which nothing is seen are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = layout.group.shape
    return create_block_mask(layout.rule(window), rows, None, width, width, device=layout.group.device)  # type: ignore[arg-type]
