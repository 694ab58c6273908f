"""Sequence classification."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Labels
from metier.core.part import Beta, part


@part("objective/classify", paper="cross-entropy over classes; label smoothing: arXiv:1512.00567, section 7")
def classify(b: Labels, *, smoothing: Beta = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy ``-Σ_c q_c log p_c`` with ``q = (1 - ε) onehot(y) + ε/C``; metric: accuracy. Returns ``[B]``."""
    loss = F.cross_entropy(b.logits, b.label, reduction="none", label_smoothing=smoothing)
    return loss, {"accuracy": (b.logits.argmax(1) == b.label).to(torch.float32)}
