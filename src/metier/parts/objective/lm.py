"""Next-token prediction."""

from torch import Tensor

from metier.core.batch import Tokens
from metier.core.part import part


@part("objective/lm", paper="cross-entropy; e.g. Bengio et al. 2003, JMLR 3, eq. 3")
def lm(b: Tokens) -> Tensor:
    """Negative log-likelihood of every token that carries loss, times its weight. Returns ``[N]``."""
    return -b.weights * b.logps
