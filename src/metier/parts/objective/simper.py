"""SimPER: inverse perplexities, without hyper-parameters."""

from torch import Tensor

from metier.core.batch import Pairs
from metier.core.part import part
from metier.core.preferences import means, reward_metrics


@part("objective/simper", paper="arXiv:2502.00883, equation 6", rows=(144,))
def simper(b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
    """``-exp(a_w) + exp(a_l)``, ``a = log π(y)/|y|``: between -1 and 1. Returns ``[B]``.

    Each side is weighted by its own inverse perplexity: an unlikely rejected answer is no longer pushed, an unlikely chosen
    one is learnt slowly. Mode seeking: with one-token answers the optimum is all mass on ``argmax p_w - p_l``. Gradients
    are small, so a clipping threshold tuned for DPO does not act. Start from a fine-tuned model. Metrics: rewards ``exp(a)``.
    """
    chosen, rejected = (a.exp() for a in means(b))
    return rejected - chosen, reward_metrics(chosen, rejected)


simper.tags = ("constraint/reference/free",)  # type: ignore[attr-defined]
