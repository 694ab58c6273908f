"""Monotone curves as mixtures of a fixed basis, and the losses made of three of them (arXiv:2411.06568).

The paper's own network was not available: the basis, the scale and the file are this library's. A curve is
``f(x) = slope Σ_i w_i b_i(x) / Σ_i w_i b_i'(x0)`` with ``w_i = softplus(a_i + t a'_i) > 0``, t the share of training that is
done, so that its slope at ``x0`` (probability 1/2, or margin 0) is ``slope``: what is searched is the shape, not the scale.
Functions of a probability u are computed from ``log u``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, MinLen
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from metier.core.preferences import log_odds

STEEP = 4.0
"""Slope of the argument of ``tanh``."""
LARGEST = 1e3
"""``1/u`` and ``exp(-z)`` are clipped here."""
At = Sequence[float]
Function = Callable[[Tensor, At], Tensor]


def _power(k: float) -> tuple[Function, Callable[[At], float]]:
    return lambda lu, at: torch.exp(k * lu), lambda at: k * 0.5 ** (k - 1)


def _sech2(x: float) -> float:
    return 1 / math.cosh(min(abs(x), 300.0)) ** 2


OF_U: dict[str, tuple[int, Function, Callable[[At], float]]] = {
    "u": (0, *_power(1)), "u2": (0, *_power(2)), "u3": (0, *_power(3)), "sqrt": (0, *_power(1 / 2)),
    "cbrt": (0, *_power(1 / 3)), "log": (0, lambda lu, at: lu, lambda at: 2.0),
    "logit": (0, lambda lu, at: log_odds(lu), lambda at: 4.0),
    "inverse": (0, lambda lu, at: -torch.exp((-lu).clamp(max=math.log(LARGEST))), lambda at: 4.0),
    "tanh": (1, lambda lu, at: torch.tanh(STEEP * (lu.exp() - at[0])), lambda at: STEEP * _sech2(STEEP * (0.5 - at[0]))),
    "unit": (2, lambda lu, at: torch.tanh(abs(at[0]) * lu + at[1]),
             lambda at: 2 * abs(at[0]) * _sech2(abs(at[0]) * math.log(0.5) + at[1])),
}  # fmt: skip
"""Increasing functions of u: how many numbers ``at`` has, ``b(log u, at)``, ``db/du`` at 1/2. ``tanh`` has the centre,
``unit`` (a hidden unit of a network on log u) slope and offset."""
OF_Z: dict[str, tuple[int, Function, Callable[[At], float]]] = {
    "logsig": (1, lambda z, at: F.logsigmoid(at[0] * z), lambda at: at[0] / 2),
    "softplus": (1, lambda z, at: -F.softplus(at[0] - z), lambda at: 1 / (1 + math.exp(min(-at[0], 700.0)))),
    "linear": (0, lambda z, at: z, lambda at: 1.0),
    "square": (1, lambda z, at: -((z - at[0]) ** 2), lambda at: 2 * at[0]),
    "half-square": (1, lambda z, at: -((at[0] - z).clamp(min=0) ** 2), lambda at: 2 * at[0]),
    "exp": (0, lambda z, at: -torch.exp((-z).clamp(max=math.log(LARGEST))), lambda at: 1.0),
}  # fmt: skip
"""Functions of the margin z, as above with ``db/dz`` at 0. All increase but ``square``, which falls beyond ``at`` (IPO)."""


@dataclass(frozen=True)
class Curve:
    """A curve, or as many as ``raw`` ``[..., n, 2]`` has leading indices: ``a`` and ``a'`` of the n terms."""

    basis: dict[str, tuple[int, Function, Callable[[At], float]]]
    terms: Sequence[tuple[str, At]]
    raw: Tensor
    slope: float | Tensor = 1.0
    """A number, or ``[..., 1]``."""

    def __call__(self, x: Tensor, t: float = 0.0) -> Tensor:
        """Values at ``x`` ``[..., B]``: log-probabilities, or margins."""
        raw = self.raw.to(x)
        weights = F.softplus(raw[..., 0] + t * raw[..., 1])
        slopes = weights.new_tensor([self.basis[name][2](at) for name, at in self.terms])
        weights = weights * (self.slope / (weights * slopes).sum(-1, keepdim=True))
        return sum(
            (weights[..., i, None] * self.basis[name][1](x, at) for i, (name, at) in enumerate(self.terms)),
            torch.zeros_like(x),
        )


def loss(
    phi: Curve, psi: Curve, g: Curve, *, lam_s: Tensor | float, lam_p: Tensor | float,
    policy: tuple[Tensor, Tensor], imitated: Tensor, frozen: tuple[Tensor, Tensor] | None, t: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``-λ_s ψ(u_w) - λ_p g(φ(π_w) - φ(π_l) - φ(μ_w) + φ(μ_l))`` and the two halves of the margin; all ``[..., B]``.

    ``policy``, ``frozen``: log-probabilities of the chosen and rejected answers; ``imitated``: ``log u_w``.
    """
    chosen, rejected = (phi(x, t) for x in policy)
    if frozen is not None:
        chosen, rejected = chosen - phi(frozen[0], t), rejected - phi(frozen[1], t)
    return -lam_s * psi(imitated, t) - lam_p * g(chosen - rejected, t), chosen, rejected


# --- the file ------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Term(_Strict):
    """One basis function with its weight: ``raw`` is ``[a, a']``."""

    basis: str
    at: tuple[float, ...] = ()
    raw: tuple[float, float] = (0.0, 0.0)


class Shape(_Strict):
    """One curve."""

    slope: Annotated[float, Gt(0)] = 1.0
    terms: Annotated[tuple[Term, ...], MinLen(1)]


class Coefficients(_Strict):
    """A whole loss, as its file holds it. A weight is a number, or ``[a, a']`` for ``softplus(a + t a')``."""

    reference: bool
    probability: Literal["mean", "sum"] = "mean"
    lam_s: Annotated[float, Ge(0)] | tuple[float, float] = 0.0
    lam_p: Annotated[float, Ge(0)] | tuple[float, float] = 1.0
    phi: Shape
    psi: Shape = Shape(slope=2.0, terms=(Term(basis="log"),))
    g: Shape = Shape(slope=0.5, terms=(Term(basis="logsig", at=(1.0,)),))


def at_time(weight: float | tuple[float, float], t: float) -> float:
    """A weight when a share t of training is done."""
    return math.log1p(math.exp(min(weight[0] + t * weight[1], 700.0))) if isinstance(weight, tuple) else weight


def _single(basis: str, slope: float, *at: float) -> Shape:
    return Shape(slope=slope, terms=(Term(basis=basis, at=at),))


def member(shape: str, tau: float) -> Coefficients:
    """A known loss, with margins not yet multiplied by β. ``log`` has slope 2 at 1/2, ``logit`` 4, ``logsig`` 1/2 at 0."""
    log, wanted = _single("log", 2.0), 1 / (2 * tau)
    return {
        "dpo": Coefficients(reference=True, probability="sum", phi=log),
        "cpo": Coefficients(reference=False, probability="sum", lam_s=1.0, phi=log),
        "orpo": Coefficients(reference=False, lam_s=1.0, lam_p=0.1, phi=_single("logit", 4.0)),
        "simper": Coefficients(reference=False, phi=_single("u", 1.0), g=_single("linear", 1.0)),
        "ipo": Coefficients(reference=True, phi=log, g=_single("square", 2 * wanted, wanted)),
    }[shape]
