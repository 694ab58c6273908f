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
    inputs = {**tokens(model, layout, embed), **masking(model, layout), **layout.extra}
    return models.backbone(model)(**inputs, use_cache=False).last_hidden_state


def tokens(model: nn.Module, layout: Layout, embed: Embed | None = None) -> dict[str, Tensor]:
    """The tokens as ids, or as mapped embeddings."""
    if embed is None:
        return {"input_ids": layout.input_ids}
    return {"inputs_embeds": embed(models.embeddings(model)(layout.input_ids))}


def masking(model: Any, layout: Layout) -> dict[str, Any]:
    """Attention mask and positions. A plain layout of a causal model needs neither: padding is on the right."""
    config = model.config
    if not _causal(model):
        return {"attention_mask": (layout.group > 0).long()}
    if layout.plain:
        return {}
    visible = layout.visible().unsqueeze(1)
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds or (not kinds and _window(config)):
        visible = _windowed(config, layout, visible, kinds)
    return {"attention_mask": visible, "position_ids": layout.position_ids}


def _causal(model: Any) -> bool:
    return model.config.model_type not in {"bert", "roberta", "distilbert", "modernbert", "deberta", "deberta-v2", "electra", "albert"}


def _window(config: Any) -> int | None:
    used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None


def _windowed(config: Any, layout: Layout, visible: Tensor, kinds: set[str]) -> Any:
    """Sliding-window layers see only near positions, counted in the sequence and not in the row."""
    window = _window(config)
    if window is None:
        raise UsageError(f"{config.model_type} has sliding-window layers of unknown width", hint="Set data.packed: false.")
    distance = layout.position_ids.unsqueeze(2) - layout.position_ids.unsqueeze(1)
    near = visible & (distance < window).unsqueeze(1)
    return {"full_attention": visible, "sliding_attention": near} if "full_attention" in kinds else near
