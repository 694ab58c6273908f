"""A fixed temperature in the softmax of attention (arXiv:2410.16682)."""

from typing import Any

from metier.core.attention import scale_logits
from metier.core.part import Positive, part


@part("model/soft-temp", paper="arXiv:2410.16682", rows=(9,))
def soft_temp(model: Any, *, beta: Positive = 0.5) -> Any:
    """Attention weights are ``softmax(beta z + mask)``, ``z = q k^T / sqrt(d)``; ``beta < 1`` flattens them.

    The same as another scale of the logits, so the fused kernel stays and nothing is added to cost, parameters or state.
    Behind ``soft-cap`` the capped logits are scaled (and attention is computed plainly, as the cap demands).

    When to use: hardly; it is the weakest guard of the paper (the learning rate it bears is that of ``soft-clip``), and a
    run can undo it by larger queries and keys. Changes ``model`` in place and returns it. Raises ``UsageError`` for
    attention that does not go through transformers' interface.
    """
    scale_logits(model, beta, "model/soft-temp")
    return model
