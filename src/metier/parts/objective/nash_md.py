"""Nash-MD: policy gradient on how often an answer wins against a mixture of policy and reference."""

from typing import Literal

from torch import Tensor

from metier.core.batch import Lists
from metier.core.part import NonNegative, part
from metier.core.preferences import average, list_metrics, log_ratio


@part("objective/nash-md", paper="arXiv:2312.00886 (NLHF), section 7; trl's NashMDTrainer for per: token", rows=(133,),
      needs=("reference",))  # fmt: skip
class NashMd:
    """``-s log π(y) + τ sg(log π/π_ref) log π(y)``, mean over the answers of a list. Returns ``[B]``.

    The scores ``s`` of the list are ``P(y > y') - 1/2``, as ``source/nash-md`` gives them for answers of the policy; the gradient
    is then that of ``P(π > π') - τ KL(π‖π_ref)``, estimated with the baseline 1/2. ``per: sequence`` multiplies the log-ratio of
    the whole answer with its log-probability, the paper's form. ``per: token`` multiplies them token by token and sums, as trl
    does: the terms it leaves out are those in which a token is credited with the log-ratios of others, later ones included,
    so its KL term is not that of whole answers. On one token both are equal.

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
        kl = ratio.detach() * b.logps if self.per == "sequence" else _by_token(b)
        loss = average(self.tau * kl - b.score * b.logps, b.present)
        mean = {"score": average(b.score, b.present), "kl": average(ratio.detach(), b.present)}
        return loss, {**list_metrics(self.tau * ratio, b), **mean}


def _by_token(b: Lists) -> Tensor:
    """``Σ_t sg(log π_t/π_ref,t) log π_t`` of each answer, ``[B, K]``."""
    tokens = b.tokens
    assert tokens is not None, "the objective declares needs=('tokens',)"
    assert tokens.ref_logps is not None
    products = (tokens.logps - tokens.ref_logps).detach() * tokens.logps
    return products.new_zeros(b.logps.numel()).index_add(0, tokens.sequence, products).view_as(b.logps)
