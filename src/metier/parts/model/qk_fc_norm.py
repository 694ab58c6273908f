"""Norms on queries, keys and on the outputs of both branches (arXiv:2410.16682)."""

from typing import Any, Literal

from metier.core import models
from metier.core.normed import normalise_output, normalise_projections
from metier.core.part import Positive, part
from metier.core.sublayers import layers, refuse_output_norms


@part("model/qk-fc-norm", paper="arXiv:2410.16682", rows=(9,))
def qk_fc_norm(
    model: Any,
    *,
    norm: Literal["layer", "rms"] = "layer",
    bias: bool = True,
    eps: Positive = 1e-6,
) -> Any:
    """QK norm, and ``x + LN(Proj(…))`` and ``y + LN(FC2(…))``: a layer norm before each residual sum.

    ``norm`` and ``bias`` are for queries and keys (over each head, before rotary positions); the norms of the outputs
    are layer norms over the whole width with gain (1 at the start) and bias (0), behind the layer's own bias and before
    dropout. At the start every branch adds a vector of norm ``sqrt(D)``, whatever the initial weights (``eps`` aside).

    Cost: four norms a block, 10 % of forward and backward (measured as for qk-norm). When to use: the paper found no
    higher learning rate than with QK norm alone, although these outputs are what visibly explodes; the loss was
    that of QK norm. Changes ``model`` in place and returns it. Raises ``UsageError`` for models that normalise
    their branches' outputs already (Gemma 2, OLMo 2), for a mixture of experts, and for attention it does not know.
    """
    where = "model/qk-fc-norm"
    refuse_output_norms(model, where)
    places = [p for block in models.blocks(model) for group in ("proj", "fc2") for p in layers(block, where)[group]]
    normalise_projections(model, where, centre=norm == "layer", gains="shared", bias=bias, eps=eps)
    for place in places:
        normalise_output(place, eps=eps)
    return model
