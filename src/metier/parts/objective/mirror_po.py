"""Mirror preference optimization: a family of losses given by three monotone curves."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from metier.core.batch import Pairs
from metier.core.errors import UsageError, unknown
from metier.core.part import NonNegative, Positive, part
from metier.core.preferences import means, reward_metrics
from metier.parts.objective._mirror import OF_U, OF_Z, Coefficients, Curve, Shape, at_time, loss, member

OWN = {"dpo": 0.1, "cpo": 0.1}
"""β where it is not 1."""


@part("objective/mirror-po", paper="arXiv:2411.06568", rows=(115,))
class MirrorPO:
    """``-λ_s ψ(u_w) - λ_p g(β [φ(π_w) - φ(π_l) - k φ(μ_w) + k φ(μ_l)])`` with increasing curves φ, ψ, g.

    φ is the inverse potential of a mirror map; ψ imitates the chosen answer; k is 1 with ``reference``. ``u`` is ``exp`` of
    the mean log-probability per token; ``probability`` says whether π and μ are that too (``mean``) or of whole answers.

    ``shape``: ``dpo`` and ``cpo`` (φ = log of whole answers), ``orpo`` (φ = log odds), ``simper`` (φ = u, g = z), ``ipo``
    (φ = log, ``g = -(z - 1/(2τ))²``); or ``custom``: the curves in the JSON file ``coefficients``, as a search writes them.
    In a file weights may change in the course of training (TA-MPO): ``a + t a'``, t from 0 to 1. β (default 0.1 for ``dpo``
    and ``cpo``, else 1) multiplies the margin; ``lam_s``, ``lam_p``, ``reference``, ``probability`` default to the shape's.

    Basis functions and scale are this library's choice, since the authors' network was not available. Every curve
    increases, but with the basis function ``square`` g does not: ``monotone`` tells.
    Metrics: rewards ``β (φ(π) - k φ(μ))`` and ``imitation``, ``ψ(u_w)``.
    """

    tags = ("constraint/divergence/generalisation",)
    reads = Pairs

    def __init__(
        self,
        *,
        shape: Literal["dpo", "orpo", "cpo", "simper", "ipo", "custom"] = "dpo",
        coefficients: str | None = None,
        reference: bool | None = None,
        probability: Literal["mean", "sum"] | None = None,
        beta: Positive | None = None,
        lam_s: NonNegative | None = None,
        lam_p: NonNegative | None = None,
        tau: Positive = 0.1,
    ) -> None:
        if (coefficients is None) == (shape == "custom"):
            what = "shape: custom needs a file" if coefficients is None else f"a file is given, but shape is {shape}"
            raise UsageError(what, where="objective/mirror-po.coefficients", hint="Say shape: custom and coefficients: FILE.")
        c = read(coefficients) if coefficients is not None else member(shape, tau)
        given = {"reference": reference, "probability": probability, "lam_s": lam_s, "lam_p": lam_p}
        c = c.model_copy(update={k: v for k, v in given.items() if v is not None})
        self.coefficients = c
        self.beta = OWN.get(shape, 1.0) if beta is None else beta
        self.needs = frozenset(["reference"] if c.reference else [])
        self.monotone = all(term.basis != "square" for term in c.g.terms)
        self.phi, self.psi, self.g = _curve(c.phi, OF_U, "phi", self.beta), _curve(c.psi, OF_U, "psi"), _curve(c.g, OF_Z, "g")
        self.progress = 0.0
        """Share of training that is done; the core sets it before each step."""

    def __call__(self, b: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[B]`` and metrics."""
        c, t = self.coefficients, self.progress
        policy, frozen = (b.chosen_logps, b.rejected_logps), None
        if c.reference:
            assert b.ref_chosen_logps is not None, "the objective declares needs=('reference',)"
            assert b.ref_rejected_logps is not None
            frozen = b.ref_chosen_logps, b.ref_rejected_logps
        if c.probability == "mean":
            lengths = b.chosen_len.clamp(min=1), b.rejected_len.clamp(min=1)
            policy = policy[0] / lengths[0], policy[1] / lengths[1]
            frozen = frozen and (frozen[0] / lengths[0], frozen[1] / lengths[1])
        imitated = means(b)[0]
        value, chosen, rejected = loss(
            self.phi, self.psi, self.g, lam_s=at_time(c.lam_s, t), lam_p=at_time(c.lam_p, t),
            policy=policy, imitated=imitated, frozen=frozen, t=t,
        )  # fmt: skip
        return value, {**reward_metrics(chosen, rejected), "imitation": self.psi(imitated, t).detach()}


def read(path: str | Path) -> Coefficients:
    """A file of coefficients. Raises ``UsageError`` that says what is wrong with it."""
    try:
        return Coefficients.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}", where="objective/mirror-po.coefficients") from e
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise UsageError(f"{path}: {place}: {first['msg']}", where="objective/mirror-po.coefficients") from e


def write(path: str | Path, coefficients: Coefficients) -> None:
    """The file that :func:`read` reads."""
    Path(path).write_text(coefficients.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _curve(shape: Shape, basis: dict[str, Any], name: str, scale: float = 1.0) -> Curve:
    where = f"objective/mirror-po.coefficients: {name}"
    for term in shape.terms:
        if term.basis not in basis:
            raise unknown("basis function", term.basis, basis, where=where)
        if len(term.at) != basis[term.basis][0]:
            raise UsageError(f"{term.basis} takes {basis[term.basis][0]} numbers `at`, got {list(term.at)}", where=where)
        if not basis[term.basis][2](term.at) > 1e-6:  # what a curve's scale is divided by
            raise UsageError(f"{term.basis} at {list(term.at)} does not increase in the middle", where=where)
    raw = torch.tensor([term.raw for term in shape.terms], dtype=torch.float64)
    return Curve(basis, [(term.basis, term.at) for term in shape.terms], raw, scale * shape.slope)
