"""Self-play preference optimization: each log-ratio against how often its answer wins."""

from typing import Literal

import torch
from torch import Tensor

from metier.core.batch import Pairs
from metier.core.errors import UsageError
from metier.core.part import Positive, part
from metier.core.preferences import log_ratios, reward_metrics


@part("objective/sppo", paper="arXiv:2405.00675, equation 4.7", needs=("reference",))
def sppo(
    b: Pairs, *, beta: Positive = 1e-3, preference: Literal["hard", "margin"] = "hard", scale: Positive = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """``(Δ_w - η(P_w - 1/2))² + (Δ_l - η(P_l - 1/2))²`` with ``η = 1/β``, ``Δ = log π/π_ref``. Returns ``[B]``.

    P is the probability that an answer wins against the policy's own: 1 and 0 with ``hard``; with ``margin`` it is
    ``σ(scale · (s_w - s_l))`` and one minus that, for scores that are Bradley–Terry log-odds up to ``scale``. A finite optimum
    for each answer alone, so the chosen one cannot fall in exchange for the rejected. The paper's square is used as it
    stands for both, as in trl; the authors' code halves the sum and takes P_w and P_l from a preference model. Starts at
    ``η²/2`` with ``hard``.

    Raises ``UsageError`` with ``margin`` when the data have no scores.
    """
    chosen, rejected = log_ratios(b)
    target = (0.5 if preference == "hard" else _win(b, scale) - 0.5) / beta
    loss = (chosen - target) ** 2 + (rejected + target) ** 2  # P_l = 1 - P_w: the targets are opposite
    return loss, reward_metrics(beta * chosen, beta * rejected)


sppo.tags = ("learning/objective/self-play", "model/optimisation/likelihood")  # type: ignore[attr-defined]
sppo.traits = {
    "model": ("preference", "its targets are win probabilities"),
    "loop": ("iterative", "each round plays against the policy before it"),
}  # type: ignore[attr-defined]


def _win(b: Pairs, scale: float) -> Tensor:
    if b.margin is None:
        raise UsageError(
            "objective/sppo with preference: margin needs the scores of both answers, and these data have none",
            hint="Give each pair `margin`, or `score_chosen` and `score_rejected`; or use preference: hard.",
        )
    return torch.sigmoid(scale * b.margin)
