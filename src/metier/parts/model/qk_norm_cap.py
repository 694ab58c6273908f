"""Norms on queries and keys and soft-capped logits, together (arXiv:2410.16682)."""

from typing import Any, Literal

from metier.core.attention import Cap, map_logits
from metier.core.errors import UsageError
from metier.core.normed import normalise_projections
from metier.core.part import Claim, Positive, part

CLAIM = Claim(
    "QK norm with capping converges at 1.5 times the learning rate that QK norm bears.",
    metric="max_stable_lr", against="model/qk-norm", lower_is_better=False,
    figure="no divergence up to 80e-3, QK norm diverges at 60e-3",
)  # fmt: skip


@part("model/qk-norm-cap", paper="arXiv:2410.16682", rows=(9,), claim=CLAIM)
def qk_norm_cap(
    model: Any,
    *,
    cap: Positive = 50.0,
    norm: Literal["layer", "rms"] = "layer",
    bias: bool = True,
    eps: Positive = 1e-6,
) -> Any:
    """``q <- LN(q)``, ``k <- LN(k)`` over each head before rotary positions; weights ``softmax(c tanh(z / c) + mask)``.

    The norms have a gain ``[d_head]`` (1 at the start) and with ``bias`` a bias (0), of their own for queries and for
    keys, shared by the heads (key heads of groups too) and without weight decay. Until the gains have grown
    ``|z| <= sqrt(d_head)``, so a cap of 50 does little at first: it bounds what the gains can do later. The cap comes
    before the mask.

    Cost: 30 % of forward and backward (measured as for qk-norm): norms, and attention in plain matrix products instead
    of a fused kernel, with memory for ``[B, H, T, T]`` logits. When to use: when a run must bear a large learning
    rate. Changes ``model`` in place and returns it. Raises ``UsageError`` for attention it does not know and for
    models that do either already.
    """
    where = "model/qk-norm-cap"
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        raise UsageError(f"{type(model).__name__} already caps its attention logits", where=where)
    normalise_projections(model, where, centre=norm == "layer", gains="shared", bias=bias, eps=eps)
    map_logits(model, Cap(cap), where)
    return model
