"""How much of a model's activations survives 4 bits, with and without clamped outliers (arXiv:2501.17116, section 3.2)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le
from torch import Tensor, nn

from metier.core import models
from metier.core.errors import UsageError
from metier.core.part import part
from metier.core.probing import Probe
from metier.core.quantize import clamp_outliers, quantize, wide
from metier.core.sublayers import linear
from metier.core.targets import is_linear

WHERE = "probe/quantization-fidelity"
KEYS = ("cosine", "mse", "snr", "clamped")
Alpha = Annotated[float, Gt(0.5), Le(1)]


@part("probe/quantization-fidelity", paper="arXiv:2501.17116", rows=(10,))
def quantization_fidelity(
    probe: Probe,
    *,
    alphas: tuple[Alpha, ...] = (1.0, 0.999, 0.99, 0.97),
    quantile: Literal["token", "tensor"] = "token",
    group: Literal["token", "tensor"] = "token",
    power_of_two: bool = False,
) -> dict[str, Any]:
    """Inputs ``X`` of every linear layer in the blocks against ``q(X)`` in E2M1: cosine, MSE and SNR.

    For each ``alpha`` outliers beyond the quantiles ``1 - alpha`` and ``alpha`` are clamped before rounding, and once more
    with the rest ``X - clamp(X)`` added again in high precision (``compensate``); ``alpha = 1`` does neither. Quantiles run
    over a token (what ``model/fp4`` does) or over the tensor of a layout (the paper's formula); a scale covers a ``group``.

    ``cosine = <X, Q> / |X| |Q|``, ``mse = |X - Q|^2 / n``, ``snr = 10 log10(|X|^2 / |X - Q|^2)`` [dB], ``clamped`` the
    fraction of elements beyond the quantiles, all over the real tokens of all layouts. ``layers`` has a row for each layer
    and setting, ``mean`` the layers' plain means. ``None`` where a value does not exist (nothing but zeros, no error).
    With few inputs C a layer clamps ``round((1 - alpha) C)`` of a token on either side, which may be none.

    In the paper each improves from no clamp to 0.999, with compensation, and then with smaller alpha. A clamp alone can lose
    more than it wins where outliers carry most of the energy; if no clamp is near the best, none is needed. Cost: a forward
    pass of each layout, and for each setting a few passes over every input.
    Layers that ``model/fp4`` changed are measured by what comes in. Raises ``UsageError`` for a model without linear layers.
    """
    if not alphas:
        raise UsageError("give at least one alpha", where=f"{WHERE}.alphas")
    settings = [(a, c) for a in dict.fromkeys(alphas) for c in ((False, True) if a < 1 else (False,))]
    layers = _linear(probe.model)
    sums: dict[str, list[list[float]]] = {name: [[0.0] * 6 for _ in settings] for name in layers}
    dims = [-1 if of == "token" else None for of in (group, quantile)]
    for layout in probe.layouts:
        layout = layout.to(probe.engine.device)
        see = partial(_see, settings, dims, power_of_two, (layout.group > 0).flatten())
        handles = [m.register_forward_pre_hook(partial(see, sums[n])) for n, m in layers.items()]
        try:
            probe.score(layout)
        finally:
            for handle in handles:
                handle.remove()
    rows = {name: [_row(*s, t) for s, t in zip(settings, total, strict=True)] for name, total in sums.items()}
    return {"mean": [_mean([r[i] for r in rows.values()]) for i in range(len(settings))], "layers": rows}


def _linear(model: Any) -> dict[str, nn.Module]:
    """Linear layers of the blocks by name; of an adapted one, the layer below its adapter."""
    names = {id(m): n for n, m in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for block in models.blocks(model):
        for m in block.modules():
            name = names[id(m)]
            below = any(name.startswith(f"{n}.") for n in found)
            if not below and (is_linear(m) or any(c.__name__ == "Conv1D" for c in type(m).__mro__)):
                found[name] = linear(m)
    if not found:
        raise UsageError(f"no linear layers in the blocks of {type(model).__name__}", where=WHERE)
    return found


def _see(
    settings: Sequence[tuple[float, bool]], dims: Sequence[int | None], power_of_two: bool, real: Tensor,
    total: list[list[float]], module: nn.Module, args: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Add one input's sums: ``<X, Q>``, ``|Q|^2``, ``|X|^2``, ``|X - Q|^2``, elements clamped, elements."""
    x = args[0].detach().flatten(0, -2)
    x = x[real] if len(x) == len(real) else x  # an expert sees tokens of its own
    x = wide(x)
    square, group, quantile = float(x.double().square().sum()), *dims
    for (alpha, compensate), sums in zip(settings, total, strict=True):
        c = clamp_outliers(x, alpha, quantile)
        q = quantize(c, group, power_of_two) + ((x - c) if compensate else 0)
        dot, size, error = (float((a.double() * b.double()).sum()) for a, b in ((x, q), (q, q), (x - q, x - q)))
        for i, value in enumerate((dot, size, square, error, float((x != c).sum()), float(x.numel()))):
            sums[i] += value


def _row(alpha: float, compensate: bool, sums: Sequence[float]) -> dict[str, Any]:
    dot, q, x, error, clamped, n = sums
    return {
        "alpha": alpha, "compensate": compensate,
        "cosine": dot / math.sqrt(q * x) if q * x > 0 else None,
        "mse": error / n if n else None,
        "snr": 10 * math.log10(x / error) if error > 0 and x > 0 else None,
        "clamped": clamped / n if n else None,
    }  # fmt: skip


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layers' mean of one setting, over those that have a value."""
    found = {key: [r[key] for r in rows if r[key] is not None] for key in KEYS}
    mean = {key: sum(v) / len(v) if v else None for key, v in found.items()}
    return {"alpha": rows[0]["alpha"], "compensate": rows[0]["compensate"], **mean}
