"""Maximal update parametrisation as multipliers: one learning rate for every width (arXiv:2408.13359, 2203.03466)."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from metier.core import models
from metier.core.errors import UsageError, unknown
from metier.core.part import Count, Positive, part

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks are ``x + attention(norm(x))``, ``x + mlp(norm(x))`` with a norm before the head and no scaling."""
ATTENTION, FINAL = ("self_attn", "attn"), ("norm", "ln_f")


@part("model/mup", paper="arXiv:2408.13359", rows=(3,))
def mup(
    model: Any,
    *,
    base: Count = 256,
    embedding: Positive = 12.0,
    residual: Positive = 0.22,
    init_std: Positive | None = 0.1,
) -> Any:
    """A model to be trained from scratch whose best learning rate does not move with its width. ``m = width / base``.

    - embeddings (token and learned positions) times ``embedding``
    - output of every attention and every MLP times ``residual`` before it is added (0.22 to 0.28 for a proxy)
    - attention logits divided by the head's size instead of its square root
    - logits divided by m: the states before the head are, so that the head stays an ordinary layer
    - weights drawn anew: matrices inside blocks with standard deviation ``init_std / √m``, embeddings and head ``init_std``,
      biases 0, gains as they are. ``init_std: null`` keeps the weights

    **The learning rate of the inner matrices is divided by m by the optimizer**, everything else keeps the full rate:
    ``optimizer: {adamw: {lr: 0.02, groups: {matrices: {lr_scale: 4}}}}`` for width 64 and base 256 (1/m = 4). Tune at one
    width, keep ``base``, change only the width (more heads of the same size) and ``lr_scale``.

    At initialisation every residual branch has the same size at any width. Logits do not: of random weights they fall as
    ``1/√m`` (the head adds up m times as many independent terms and divides by m), as muP wants it; what training adds to them,
    and what a tied head says of the token just read, does not depend on the width.

    Changes ``model`` in place by forward hooks, names and checkpoints stay as they are; returns it. Cost: two scalings per
    block. The released engine also divides the output projections' standard deviation by ``√(2 layers)``; the paper, which
    this follows, has ``residual`` for that. In transformers, Granite has the same multipliers in its config.

    Raises ``UsageError`` for other families, and when applied twice.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise unknown("model family", kind, FAMILIES, where="model/mup")
    if getattr(model, "mup_width", None) is not None:
        raise UsageError("model/mup has already been applied to this model", where="model/mup")
    m = model.config.hidden_size / base
    backbone = models.backbone(model)
    tables = [x for x in backbone.modules() if isinstance(x, nn.Embedding)]
    for table in tables:
        table.register_forward_hook(partial(_scaled, embedding))
    for block in models.blocks(model):
        attention = _child(block, ATTENTION)
        attention.scaling = 1 / attention.head_dim
        for branch in (attention, block.mlp):
            branch.register_forward_hook(partial(_scaled, residual))  # type: ignore[union-attr]
    _child(backbone, FINAL).register_forward_hook(partial(_scaled, 1 / m))
    model.mup_width = m
    if init_std is not None:
        _draw(model, init_std, m)
    return model


def _child(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next(getattr(module, n) for n in names if hasattr(module, n))


def _scaled(factor: float, module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook; attention gives its output first in a tuple."""
    return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


@torch.no_grad()
def _draw(model: Any, std: float, m: float) -> None:
    """New weights for every table and matrix."""
    inner = {id(p) for block in models.blocks(model) for p in block.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or (hasattr(module, "weight") and module.weight.ndim == 2):
            module.weight.normal_(0.0, std / math.sqrt(m) if id(module.weight) in inner else std)
            if getattr(module, "padding_idx", None) is not None:
                module.weight[module.padding_idx].zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()  # type: ignore[operator]
