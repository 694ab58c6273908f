"""How strongly a preference objective rewards the chosen and penalizes the rejected answer, over a grid of scores."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metier.core.batch import Pairs, Tokens
from metier.core.config import PartRef
from metier.core.errors import UsageError
from metier.core.lossmodule import batch_type, scores_again
from metier.core.part import Count, Positive, build, part
from metier.core.probing import Probe

EXTENSION, GROWS = 100.0, 3.0
SIDES = ("c_plus", "c_minus")
Cell = dict[str, Any]


@part("probe/gradient-coefficients", paper="arXiv:2408.16751", rows=(98,))
def gradient_coefficients(
    probe: Probe,
    *,
    objective: PartRef = "dpo",
    points: Count = 9,
    length: Count = 10,
    nearest: Positive = 0.01,
    farthest: Positive = 10.0,
    reference: float = -1.0,
) -> dict[str, Any]:
    """``c+ = -∂L/∂log π(y_w)`` and ``c- = ∂L/∂log π(y_l)`` of an objective of pairs, by autograd, pair by pair.

    The table runs over token means of both answers, ``points`` of each from ``-farthest`` to ``-nearest`` in a geometric
    row, for answers of ``length`` equal tokens; log-probabilities are their sums. ``reference`` is the token mean under the
    reference model, for both answers and samples. ``at_reference``: the policy is there too (the start of training).

    ``never_negative``: no coefficient of the table is below 0 (a negative c+ pushes the chosen answer down). ``growth``: how
    often the table's largest absolute value fits into that of a grid 100 times wider at both ends; ``bounded``: fewer than
    3 times (what a grid can say). Each pair is a step of its own, and an objective with a state has seen none. ``data``: mean
    coefficients, their ratio and the share of negative c+ on the probed pairs, for a run that reads pairs and scores what the
    objective needs; otherwise None. Raises ``UsageError`` for an objective that does not read pairs.
    """
    built = build("objective", objective)
    if scores_again(built.obj) or batch_type(built.obj) is not Pairs:
        raise UsageError(f"{built.id} does not read scored pairs: it has no such coefficients", where="objective")
    needs = built.needs
    if nearest >= farthest:
        raise UsageError(f"nearest = {nearest} must be below farthest = {farthest}", where="nearest")

    def table(near: float, far: float) -> list[Cell]:
        row = _geometric(near, far, points)
        return [_at(built.obj, needs, w, r, length, reference) for w in row for r in row]

    inner, outer = table(nearest, farthest), table(nearest / EXTENSION, farthest * EXTENSION)
    growth = {side: _ratio(_largest(outer, side), _largest(inner, side)) for side in SIDES}
    return {
        "objective": built.id, "length": length, "reference": reference,
        "at_reference": _at(built.obj, needs, reference, reference, length, reference),
        "never_negative": {side: all(cell[side] >= 0 for cell in inner) for side in SIDES},
        "largest": {side: _largest(inner, side) for side in SIDES},
        "growth": growth,
        "bounded": {side: _largest(outer, side) <= GROWS * _largest(inner, side) for side in SIDES},
        "data": _on_data(probe, built.obj, needs),
        "table": inner,
    }  # fmt: skip


def coefficients(objective: Any, batch: Pairs, leaves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``(c+, c-)`` of a batch made of ``leaves``, the two answers' log-probabilities."""
    result = objective(batch)
    loss = result[0] if isinstance(result, tuple) else result
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    chosen, rejected = (torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))
    return -chosen, rejected


def _at(objective: Any, needs: frozenset[str], chosen: float, rejected: float, length: int, reference: float) -> Cell:
    leaves = tuple(torch.tensor([length * v], dtype=torch.float64, requires_grad=True) for v in (chosen, rejected))
    with torch.enable_grad():
        plus, minus = coefficients(objective, _pair(leaves, needs, length, reference), leaves)  # type: ignore[arg-type]
    c_plus, c_minus = float(plus) + 0.0, float(minus) + 0.0
    return {"chosen": chosen, "rejected": rejected, "c_plus": c_plus, "c_minus": c_minus, "ratio": _ratio(c_minus, c_plus)}


def _pair(leaves: tuple[Tensor, Tensor], needs: frozenset[str], length: int, reference: float) -> Pairs:
    """One pair with every field that an objective can need; both answers' tokens are equally likely."""
    size = torch.full_like(leaves[0], float(length)).detach()
    known = size * reference if "reference" in needs else None
    batch = Pairs(*leaves, size, size, known, known, margin=torch.ones_like(size))
    if "samples" in needs:
        sampled = (size * reference).unsqueeze(1)
        batch = replace(batch, sampled_logps=sampled, sampled_len=size.unsqueeze(1), ref_sampled_logps=sampled)
    if "tokens" not in needs:
        return batch
    logps = torch.cat([leaf.expand(length) / length for leaf in leaves])
    tokens = Tokens(
        logps, torch.ones_like(logps).detach(), torch.arange(2).repeat_interleave(length),
        torch.full_like(logps, reference).detach() if known is not None else None, collision=logps.detach(),
    )  # fmt: skip
    return replace(batch, tokens=tokens)


def _on_data(probe: Probe, objective: Any, needs: frozenset[str]) -> dict[str, float | int | None] | None:
    module: Any = getattr(probe.module, "module", probe.module)
    if probe.reads is not Pairs or not needs <= (module.needs & {"reference"}) | {"batch"}:
        return None
    plus, minus = [], []
    for layout in probe.layouts:
        with torch.no_grad(), probe.engine.autocast():
            batch = module.score(layout.to(probe.engine.device))
        leaves = tuple(x.detach().double().requires_grad_() for x in (batch.chosen_logps, batch.rejected_logps))
        with torch.enable_grad():
            c = coefficients(objective, replace(batch, chosen_logps=leaves[0], rejected_logps=leaves[1]), leaves)
        plus.append(c[0])
        minus.append(c[1])
    if not plus:
        return None
    p, m = torch.cat(plus), torch.cat(minus)
    mean_p, mean_m = float(p.mean()), float(m.mean())
    share = float((p < 0).double().mean())
    return {"pairs": len(p), "c_plus": mean_p, "c_minus": mean_m, "ratio": _ratio(mean_m, mean_p), "negative_c_plus": share}


def _geometric(near: float, far: float, points: int) -> list[float]:
    return [-far * (near / far) ** (i / max(1, points - 1)) for i in range(points)]


def _largest(cells: list[Cell], side: str) -> float:
    return max(abs(cell[side]) for cell in cells)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
