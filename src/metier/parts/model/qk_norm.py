"""QK norm: normalise queries and keys, so that attention logits cannot grow without bound (arXiv:2302.05442,
section 2)."""

from typing import Any, Literal

from metier.core.normed import normalise_projections
from metier.core.part import Positive, part


@part("model/qk-norm", paper="arXiv:2302.05442", rows=(9,))
def qk_norm(
    model: Any,
    *,
    over: Literal["head", "projection"] = "head",
    norm: Literal["rms", "layer"] = "rms",
    gains: Literal["shared", "each", "none"] = "shared",
    bias: bool = False,
    eps: Positive = 1e-6,
) -> Any:
    """Queries and keys become ``g * x / rms(x)`` after their projection (and bias), before rotary positions.

    ``over`` is what one mean runs over: a head, or the whole projection. ``norm: layer`` subtracts the mean
    first. ``gains`` start at 1: one vector for all heads, one for each head, or none; ``bias`` adds a vector
    that starts at 0 (arXiv:2410.16682 uses ``norm: layer`` with gain and bias). With gains 1 and no bias no
    logit exceeds ``sqrt(d_head)``. Gains and biases get no weight decay (they belong to the role ``rest``).

    Cost: two norms a block; with layer norms 3 % of forward and backward (lab/llama-1m, 8 x 128 tokens, one core; 5 to
    10 % elsewhere, by the paper's account). No state but the gains. Changes ``model`` in place and returns it; a
    projection ``…q_proj`` becomes ``…q_proj.q_proj`` beside ``…q_proj.norm``, so an adapter put on it later comes
    before the norm. For training from scratch: a pretrained model needs fine-tuning afterwards. Raises
    ``UsageError`` for attention it does not know, or that has such a norm already.
    """
    normalise_projections(model, "model/qk-norm", over=over, centre=norm == "layer", gains=gains, bias=bias, eps=eps)
    return model
