"""Preference losses compiled from propositional programs."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.errors import UsageError
from metier.core.formulas import log_count
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import means, reward_metrics
from metier.parts.objective._codes import compiled, decode


@part("objective/logic", paper="arXiv:2412.17696", rows=(140,))
class Logic:
    """``f(ρ)`` with ``ρ = log Pr((P or A) and C) - log Pr((not P or A) and C)``, for a formula P, a condition C (``given``)
    and facts A over the atoms W and L (the policy accepts the chosen, the rejected answer), RW and RL (the reference does).

    Atoms are independent; an atom's probability is that of its answer, ``exp`` of the mean log-probability per token
    (``probability: sum`` of the sum, where ``1 - p`` is 1 on long answers and many programs coincide).

    ``code`` names a program by its truth table instead of formulas: a sign per row TT, TF, FT, FF of (W, L), ``+`` wins,
    ``-`` loses, ``*`` both, ``.`` neither; 16 signs for (W, L, RW, RL). E.g. ``*+-.`` is CPO, ``.+-.`` ORPO's odds ratio,
    ``++-.`` "constrained". ``reference: true`` lifts a program over W and L: ρ of the policy minus ρ of the reference.

    ``link``: ``logistic`` ``-log σ(β ρ)``; ``squared`` ``(ρ - 1/(2τ))²``; ``margin`` ``max(0, β - ρ)``.
    ``nll_weight`` times the mean negative log-likelihood per token of the chosen answer is added.

    Log-probabilities are kept below -1e-6. Metrics: rewards ``β log p`` (over the reference where it is read) and ``rho``.
    Written from the library's card, which knew the paper's abstract and had no code to compare with.
    """

    tags = ("constraint/divergence/generalisation",)
    reads = Pairs

    def __init__(
        self,
        *,
        formula: str = "L -> W",
        given: str = "true",
        facts: str = "false",
        code: str | None = None,
        reference: bool = False,
        link: Literal["logistic", "squared", "margin"] = "logistic",
        beta: Positive = 1.0,
        tau: Positive = 0.1,
        probability: Literal["mean", "sum"] = "mean",
        nll_weight: NonNegative = 0.0,
    ) -> None:
        if code is not None and (formula, given, facts) != ("L -> W", "true", "false"):
            raise UsageError("a program is given by its code or by formulas, not by both", where="objective/logic.code")
        self.code = compiled(formula, given, facts, "objective/logic") if code is None else code
        self.winner, self.loser = decode(self.code, "objective/logic.code")
        self.four = len(self.code) == 16
        if reference and self.four:
            raise UsageError(
                "the program reads RW and RL already", where="objective/logic.reference", hint="Leave out reference."
            )
        self.needs = frozenset(["reference"] if reference or self.four else [])
        self.link, self.beta, self.tau = link, beta, tau
        self.probability, self.nll_weight = probability, nll_weight

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[B]`` and metrics."""
        policy = self._logps(b.chosen_logps, b.rejected_logps, b)
        frozen = None
        if self.needs:
            assert b.ref_chosen_logps is not None, "the objective declares needs=('reference',)"
            assert b.ref_rejected_logps is not None
            frozen = self._logps(b.ref_chosen_logps, b.ref_rejected_logps, b)
        rho = self.rho(policy, frozen)
        rewards = self.beta * (policy if frozen is None else policy - frozen)
        loss = self._linked(rho) - self.nll_weight * means(b)[0]
        return loss, {**reward_metrics(rewards[:, 0], rewards[:, 1]), "rho": rho.detach()}

    def rho(self, policy: Tensor, frozen: Tensor | None = None) -> Tensor:
        """``ρ`` ``[B]`` from log-probabilities of both answers ``[B, 2]``, under the policy and under the reference."""
        if self.four and frozen is not None:
            return self._ratio(torch.cat([policy, frozen], dim=1))
        rho = self._ratio(policy)
        return rho if frozen is None else rho - self._ratio(frozen)

    def _logps(self, chosen: Tensor, rejected: Tensor, b: Pairs) -> Tensor:
        pair = torch.stack([chosen, rejected], dim=1)
        return pair if self.probability == "sum" else pair / torch.stack([b.chosen_len, b.rejected_len], dim=1).clamp(min=1)

    def _ratio(self, logp: Tensor) -> Tensor:
        return log_count(self.winner, logp) - log_count(self.loser, logp)

    def _linked(self, rho: Tensor) -> Tensor:
        if self.link == "logistic":
            return -F.logsigmoid(self.beta * rho)
        if self.link == "squared":
            return (rho - 1 / (2 * self.tau)) ** 2
        return (self.beta - rho).clamp(min=0)
