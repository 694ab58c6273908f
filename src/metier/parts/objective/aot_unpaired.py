"""Alignment via optimal transport on single answers: good rewards should dominate bad ones quantile by quantile."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Rated
from metier.core.part import Positive, part
from metier.core.preferences import class_means, log_ratio, rated_metrics


@part(
    "objective/aot-unpaired",
    paper="arXiv:2406.05882, the unpaired variant (uAOT)",
    needs=("reference", "batch"),
)
def aot_unpaired(b: Rated, *, beta: Positive = 0.01) -> tuple[Tensor, dict[str, Tensor]]:
    """``∫₀¹ -log σ(β(Q₊(u) - Q₋(u))) du``; ``Q`` are the quantile functions of ``D = log π/π_ref`` by label. Returns ``[B]``.

    With as many desirable as undesirable answers in the step this is the mean over pairs of sorted log-ratios, as the paper
    writes it. Otherwise the empirical quantile functions are steps of different widths and the integral is still
    exact, so that no answer is dropped. An answer's loss is the mean over its own share of ``u``; both labels give the
    integral, and the mean over all answers does too. A step that has only one label says nothing: loss 0, and the metric
    ``one_sided`` is 1. The default β is the paper's (trl's is 0.1).
    """
    ratio = log_ratio(b)
    metrics = {**rated_metrics(beta * ratio, b.label), **class_means(beta * ratio, b.label)}
    good, bad = b.label.nonzero().squeeze(1), (~b.label).nonzero().squeeze(1)
    n, m = good.numel(), bad.numel()
    if n == 0 or m == 0:
        return ratio * 0, {**metrics, "one_sided": ratio.new_ones(())}
    good, bad = good[ratio[good].detach().argsort(stable=True)], bad[ratio[bad].detach().argsort(stable=True)]
    start, width = _segments(n, m, ratio.device)
    width = width.to(ratio.dtype)
    i, j = good[start // m], bad[start // n]
    pair = F.softplus(-beta * (ratio[i] - ratio[j]))
    loss = torch.zeros_like(ratio).index_add(0, i, pair * (width / m)).index_add(0, j, pair * (width / n))
    return loss, {**metrics, "one_sided": ratio.new_zeros(())}


aot_unpaired.tags = ("data/feedback/point",)  # type: ignore[attr-defined]


def _segments(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Start and width of the pieces on which both step functions are constant, in units of ``1 / (n m)``: integers, so that
    no rounding decides which quantile a piece belongs to."""
    edges = torch.cat([torch.arange(n + 1, device=device) * m, torch.arange(m + 1, device=device) * n]).unique()
    return edges[:-1], edges.diff()
