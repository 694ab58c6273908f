"""Training in simulated 4-bit floating point (arXiv:2501.17116): a gradient estimator for weights, clamped outliers for
activations."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from metier.core import models, quantize
from metier.core.errors import UsageError, unknown
from metier.core.part import Positive, part
from metier.core.targets import is_linear

WHERE = "model/fp4"
Steepness = Annotated[float, Ge(1)]
Alpha = Annotated[float, Gt(0.5), Le(1)]


@dataclass(frozen=True)
class Recipe:
    """How one layer rounds its weight and its input."""

    weights: str
    k: float
    cap: float
    activations: str
    alpha: float
    quantile: str
    act_group: str
    weight_group: str
    power_of_two: bool

    def weight(self, w: Tensor, contracted: int) -> Tensor:
        """The weight as the product sees it; ``contracted`` is its dimension of inputs."""
        if self.weights == "none":
            return w
        dim = contracted if self.weight_group == "channel" else None

        def slope(w: Tensor) -> Tensor:
            scaled = quantize.wide(w) * quantize.absmax_scale(w, dim, self.power_of_two)
            return quantize.staircase_slope(scaled, self.k, self.cap)

        value = partial(quantize.quantize, dim=dim, power_of_two=self.power_of_two)
        return quantize.pass_through(w, value, slope if self.weights == "dge" else None)

    def activation(self, x: Tensor) -> Tensor:
        """The input ``[…, C]`` as the product sees it."""
        if self.activations == "none":
            return x
        dim = -1 if self.act_group == "token" else None
        if self.activations == "direct":
            return quantize.pass_through(x, partial(quantize.quantize, dim=dim, power_of_two=self.power_of_two))
        value = partial(
            quantize.quantize_clamped, dim=dim, alpha=self.alpha, alpha_dim=-1 if self.quantile == "token" else None,
            compensate=self.activations == "occ", power_of_two=self.power_of_two,
        )  # fmt: skip
        return quantize.pass_through(x, value)


class Simulated(nn.Module):
    """Mixed in before the class of a linear layer: ``W [out, in]``, or ``[in, out]`` in ``Conv1D``."""

    fp4: Recipe
    inputs_first: bool
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in]`` -> ``[…, out]``."""
        w = self.fp4.weight(self.weight, 0 if self.inputs_first else 1)
        return F.linear(self.fp4.activation(x), w.T if self.inputs_first else w, self.bias)


@part("model/fp4", paper="arXiv:2501.17116", rows=(10,))
def fp4(
    model: Any,
    *,
    weights: Literal["dge", "ste", "none"] = "dge",
    k: Steepness = 5.0,
    cap: Positive = 3.0,
    activations: Literal["occ", "clamp", "direct", "none"] = "occ",
    alpha: Alpha = 0.99,
    quantile: Literal["token", "tensor"] = "token",
    act_group: Literal["token", "tensor"] = "token",
    weight_group: Literal["channel", "tensor"] = "channel",
    power_of_two: bool = False,
    skip: tuple[str, ...] = (),
) -> Any:
    """Every linear layer in the blocks computes ``Y = q(X) q(W)^T`` with ``q(x) = round(s x) / s``, ``s = 6 / max |x|``.

    ``round`` goes to the nearest of 0, ±0.5, 1, 1.5, 2, 3, 4, 6 (E2M1), ties up. One scale for each token (``act_group``)
    and output channel (``weight_group``), both over the contracted dimension, or one for the tensor, which is much worse;
    ``power_of_two`` rounds scales down to powers of two. Embeddings, output layer, norms and biases are left alone, and so
    are layers that a glob in ``skip`` names, by full name or its end (``down_proj``, ``model.layers.0.*``).

    ``weights: dge`` multiplies the gradient of ``W`` by ``f'(s W) = min(cap, (1/k) |2z/d - 1|^(1/k - 1))``, ``z`` the place
    in the interval of length ``d`` between two levels; ``ste`` takes ``f' = 1``, which is ``k = 1``; ``none`` does not round.
    ``activations: occ`` clamps each token's (``quantile: tensor``: the whole tensor's) outliers to its quantiles ``1 - alpha``
    and ``alpha``, quantises, and adds the product of the sparse rest in high precision; ``clamp`` drops the rest,
    ``direct`` does not clamp. Of C inputs ``round((1 - alpha) C)`` are clamped on either side: with 0.99 none below C = 50.
    Gradients pass rounding and clamping unchanged; backward products, with ``q(X)`` (and the rest) and ``q(W)``, are exact.

    Weights stay the parameters they were, in full precision, under their names: anything can read the saved model, and
    metier applies FP4 to it again. Adapters come on top of the quantised layer; merged, they join the unrounded weight.
    Cost: time 1.5 to 3 times; until the backward pass a rounded copy of each weight and of each layer's input (queries, keys
    and values no longer share theirs). It simulates numerics: no memory or time is saved.

    When to use: to learn whether training would bear 4 bits. Deviates from the released code: scales are exact and one per
    *output* channel, as the paper says (the code's, over its dimension 0, do not factor out of the product); the same
    number of outliers on either side; compensation, which its linear layer leaves out; gradients, optimizer state and
    their communication are not in FP8. A scale or quantile of a whole tensor sees later tokens, padding and other rows of
    the batch: for comparisons only. Changes ``model`` in place and returns it; list it after parts that exchange layers.
    Raises ``UsageError`` for a glob without a layer, weights that are quantised or reparametrised, and applied twice.
    """
    recipe = Recipe(weights, k, cap, activations, alpha, quantile, act_group, weight_group, power_of_two)
    for layer in _chosen(model, skip):
        layer.fp4, layer.inputs_first = recipe, type(layer).__name__ == "Conv1D"
        # Its class alone changes: parameters, hooks, and what asks for an nn.Linear find the layer they know.
        layer.__class__ = _simulated(type(layer))
    return model


@cache
def _simulated(kind: type) -> type:
    return type(f"FP4{kind.__name__}", (Simulated, kind), {})


def _chosen(model: Any, skip: tuple[str, ...]) -> list[Any]:
    """The linear layers of the blocks that no glob leaves out."""
    inside = {id(m) for block in models.blocks(model) for m in block.modules()}
    named = {n: m for n, m in model.named_modules() if id(m) in inside and (is_linear(m) or isinstance(m, Simulated))}
    left: set[str] = set()
    for glob in skip:
        found = {n for n in named if fnmatchcase(n, glob) or fnmatchcase(n, f"*.{glob}")}
        if not found:
            raise unknown("layer", glob, sorted({n.rsplit(".", 1)[-1] for n in named}), where=f"{WHERE}.skip")
        left |= found
    for name, layer in named.items():
        if isinstance(layer, Simulated) or not layer.weight.is_floating_point():
            raise UsageError(f"the weight of {name} is quantised already", where=WHERE)
        if parametrize.is_parametrized(layer):
            raise UsageError(f"the weight of {name} is reparametrised", where=WHERE, hint="List fp4 before that part.")
    if not named:
        raise UsageError(f"no linear layers in the blocks of {type(model).__name__}", where=WHERE)
    return [m for n, m in named.items() if n not in left]
