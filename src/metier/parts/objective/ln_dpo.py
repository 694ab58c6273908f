"""Direct preference optimization on log-ratios per token."""

from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/ln-dpo", paper="arXiv:2407.15229 (LN-DPO)", rows=(92,), needs=("reference",))
def ln_dpo(b: Pairs, *, beta: Positive = 5.0) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log σ(β Δ_w/n_w - β Δ_l/n_l)`` with ``Δ = log π/π_ref`` and n the answer's loss tokens (at least 1). Returns ``[B]``.

    A token of a long answer weighs as much as one of a short answer of the pair, so length is not a way to a margin. The
    averaged margin is small: β is one to two orders above that of ``objective/dpo`` (5 in Tulu 3; the paper's grid
    was not available when this was written). With equal lengths n it is ``dpo`` with β/n. Starts at ``log 2``.

    Metrics: rewards ``β Δ/n``, which are not those of a KL-regularized optimum.
    """
    chosen, rejected = log_ratios(b)
    chosen, rejected = beta * chosen / b.chosen_len.clamp(min=1), beta * rejected / b.rejected_len.clamp(min=1)
    return -F.logsigmoid(chosen - rejected), reward_metrics(chosen, rejected)


ln_dpo.tags = ("model/generation/length",)  # type: ignore[attr-defined]
