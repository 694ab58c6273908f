"""Soft-capped attention logits (arXiv:2408.00118, section 2; as a guard in arXiv:2410.16682)."""

from typing import Any

from metier.core.attention import Cap, map_logits
from metier.core.errors import UsageError
from metier.core.part import Positive, part


@part("model/soft-cap", paper="arXiv:2410.16682", rows=(9,))
def soft_cap(model: Any, *, cap: Positive = 50.0) -> Any:
    """Attention weights are ``softmax(c tanh(z / c) + mask)``, ``z = q k^T / sqrt(d)``: no logit leaves ``(-c, c)``.

    The cap comes before the mask (after it, ``-inf`` would become ``-c`` and hidden positions would be seen). It is
    computed in float32; ``c`` to infinity is plain attention. No parameters, no state; the saved weights are those
    of the plain model. Cost: attention in plain matrix products instead of a fused kernel, so memory for ``[B, H,
    T, T]`` logits, which the backward pass keeps three times; 20 % of forward and backward (measured as for
    qk-norm), more for longer rows.

    When to use: to bear a higher learning rate without norms; on its own it does not lower the loss. Changes ``model``
    in place and returns it; several such parts apply in the order written. Raises ``UsageError`` for attention that does
    not go through transformers' interface, and for models that cap their logits already (Gemma 2).
    """
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        raise UsageError(f"{type(model).__name__} already caps its attention logits", where="model/soft-cap")
    map_logits(model, Cap(cap), "model/soft-cap")
    return model
