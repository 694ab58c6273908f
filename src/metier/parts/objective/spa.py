"""SPA's self-refinement: pairs that a stronger version of the model doubts are trained on with a softer label."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core.batch import Pairs
from metier.core.part import Count, Fraction, NonNegative, Positive, part
from metier.core.preferences import log_ratios, reward_metrics
from metier.parts.objective._statistics import pair_tokens, per_answer


@part("objective/spa", paper="arXiv:2406.04412, section 4.2", rows=(135,), needs=("reference", "batch"))
class Spa:
    """DPO with a soft label for doubtful pairs: ``-w log σ(βh) - (1 - w) log σ(-βh)``. Returns ``[B]``.

    A judge without gradient, the model extrapolated away from the reference, ``z̃ = (1 + λ) z_θ - λ z_ref`` for every position,
    gives each pair the margin ``c = β[(l̃_w - l̃_l) - (l_ref,w - l_ref,l)]``, ``l̃ = Σ_t log softmax(z̃)_{y_t}``. Pairs with
    ``c < κ`` have ``w = 1 - alpha``, the others 1: those among the ``⌊q W⌋`` smallest of the W margins last seen in training
    (at most ``window``, those of the step included), and of equal ones none, so that a model that equals its reference doubts
    nothing. In the first ``warmup`` of the run w is 1.

    λ = 0, the released default, is ``c = βh`` and takes no logits. The released code compares with a fixed place in a
    list that grows for ever, so that its quantile sinks; here the window slides, as the paper's text has it. Its λ schedule is
    not known: λ is constant. The reference is the model before this round (``hook/tr-dpo: {share: 1, every: round}``),
    not the initial one that ``source/spa`` labels with. Metrics: rewards ``β log π/π_ref``, ``confidence`` c, ``doubted``.
    """

    tags = ("data/quality/noise",)
    traits = {
        "annotator": ("ai", "all labels but a few seeds are the model's own"),
        "loop": ("iterative", "rounds of answers that the model labels"),
    }
    reads = Pairs

    def __init__(
        self, *, beta: Positive = 0.1, lam: NonNegative = 0.0, q: Fraction = 0.1, alpha: Fraction = 0.1, window: Count = 1024,
        warmup: Fraction = 0.2,
    ) -> None:  # fmt: skip
        self.beta, self.lam, self.q, self.alpha, self.window, self.warmup = beta, lam, q, alpha, window, warmup
        self.needs = frozenset({"reference", "batch"} | ({"tokens", "logits"} if lam > 0 else set()))
        self.progress = 1.0
        """Share of the run that is done; the core sets it before each step."""
        self.margins: list[float] = []

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics; reads the window."""
        chosen, rejected = (self.beta * r for r in log_ratios(b))
        c = self.confidence(b)
        doubted = (c < self.threshold()).to(chosen.dtype)
        soft = doubted * (self.alpha if self.progress >= self.warmup else 0.0)
        z = chosen - rejected
        loss = -(1 - soft) * F.logsigmoid(z) - soft * F.logsigmoid(-z)
        return loss, {**reward_metrics(chosen, rejected), "confidence": c, "doubted": doubted}

    @torch.no_grad()
    def confidence(self, b: Pairs) -> Tensor:
        """Margin c ``[B]`` of the extrapolated judge."""
        if self.lam == 0:
            chosen, rejected = log_ratios(b)
            return self.beta * (chosen - rejected)
        if b.tokens is None:  # condensed
            assert b.margin is not None
            return b.margin
        t = pair_tokens(b)
        assert t.logits is not None
        assert t.ref_logits is not None
        assert t.targets is not None
        z = (1 + self.lam) * t.logits - self.lam * t.ref_logits
        judged = z.gather(1, t.targets.unsqueeze(1)).squeeze(1) - z.logsumexp(1)
        sums = per_answer(judged, t.sequence, 2 * len(b.chosen_logps))
        assert b.ref_chosen_logps is not None
        assert b.ref_rejected_logps is not None
        return self.beta * ((sums[0::2] - sums[1::2]) - (b.ref_chosen_logps - b.ref_rejected_logps))

    def condense(self, b: Pairs) -> Pairs:
        """The pairs with c in the place of ``margin`` instead of whole rows of logits."""
        return b if self.lam == 0 else replace(b, margin=self.confidence(b), tokens=None)

    def threshold(self) -> float:
        """κ, the smallest margin that is not doubted; minus infinity when none is, infinity when all are."""
        count = math.floor(self.q * len(self.margins) + 1e-9)
        return sorted([*self.margins, math.inf])[count] if count else -math.inf

    def observe(self, b: Pairs) -> None:
        """Take the step's margins into the window."""
        self.margins = (self.margins + self.confidence(b).tolist())[-self.window :]

    def state_dict(self) -> dict[str, list[float]]:
        """The window."""
        return {"margins": list(self.margins)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take up the window."""
        self.margins = [float(c) for c in state["margins"]]
