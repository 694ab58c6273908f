"""Nash-MD: policy gradient on how often an answer wins against a mixture of policy and reference."""

from typing import Literal

from torch import Tensor

from metier.core.batch import Lists
from metier.core.part import NonNegative, part
from metier.core.preferences import average, list_metrics, log_ratio


@part("objective/nash-md", paper="arXiv:2312.00886 (NLHF), section 7; trl's NashMDTrainer for per: token", rows=(133,),
      needs=("reference",))  # fmt: skip
class NashMd:
    """``c(y) log π(y)``, mean over the answers of a list; ``c = τ log π/π_ref - s`` less its mean over the other answers of the
    list, without gradient. Returns ``[B]``.

    The scores ``s`` of the list are ``P(y > y') - 1/2``, as ``source/nash-md`` gives them for answers of the policy; the gradient
    is then that of ``P(π > π') - τ KL(π‖π_ref)``. The paper's baseline is 1/2 alone. The other answers as baseline leave the
    expected gradient as it is and make it right when some answers never occur: sources bar the end token from the first place,
    since a row of data holds no empty answer. If those that can occur, B, are drawn with ``π(y)/π(B)``, the baseline 1/2 leaves
    ``E[s - τ log π/π_ref] ∇log π(B)``, by which mass leaks to answers that nobody draws or judges. The ``c`` of a list sum to 0,
    so ``log π(B)`` and, in the log-ratio, that of both models cancel: the gradient is exactly the one of the game among B, of
    policy and reference renormalised there. What mass B has is neither learnt nor unlearnt. A list of one answer keeps 1/2.

    ``per: token`` is trl's form, with the baseline 1/2 and its leak: log-ratio and log-probability are multiplied token by token
    and summed. The terms it leaves out are those in which a token is credited with the log-ratios of others, later ones
    included, so its KL term is not that of whole answers.

    Only at the policy that sampled the answers is this the gradient asked for: keep rounds short (``prompts`` of the source).
    The value of the loss says nothing. Metrics: those of lists with ``τ log π/π_ref`` as the reward, ``score`` and ``kl``, the
    mean log-ratio.
    """

    tags = ("learning/objective/self-play",)
    traits = {
        "model": ("preference", "its scores are win probabilities"),
        "policy": ("on", "a policy gradient, right only on the policy's own answers"),
        "loop": ("iterative", "its answers are drawn anew each round"),
    }
    reads = Lists

    def __init__(self, *, tau: NonNegative = 0.1, per: Literal["sequence", "token"] = "sequence") -> None:
        self.tau, self.per = tau, per
        self.needs = frozenset({"reference"} | ({"tokens"} if per == "token" else set()))

    def __call__(self, b: Lists) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[B]`` and metrics."""
        ratio = log_ratio(b)
        if self.per == "sequence":
            products = centred(self.tau * ratio.detach() - b.score, b.present) * b.logps
        else:
            products = self.tau * _by_token(b) - b.score * b.logps
        loss = average(products, b.present)
        mean = {"score": average(b.score, b.present), "kl": average(ratio.detach(), b.present)}
        return loss, {**list_metrics(self.tau * ratio, b), **mean}


def centred(values: Tensor, present: Tensor) -> Tensor:
    """``[B, K]`` less the mean of the other present ones of the list; as they are where there is no other."""
    values = values.masked_fill(~present, 0.0)
    others = (present.sum(-1, keepdim=True) - 1).clamp(min=1)
    return values - (values.sum(-1, keepdim=True) - values) / others


def _by_token(b: Lists) -> Tensor:
    """``Σ_t sg(log π_t/π_ref,t) log π_t`` of each answer, ``[B, K]``."""
    tokens = b.tokens
    assert tokens is not None, "the objective declares needs=('tokens',)"
    assert tokens.ref_logps is not None
    products = (tokens.logps - tokens.ref_logps).detach() * tokens.logps
    return products.new_zeros(b.logps.numel()).index_add(0, tokens.sequence, products).view_as(b.logps)
