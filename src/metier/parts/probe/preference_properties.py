"""What a judge, a reward model or a data set prefers: sparse Bayesian logistic regression on properties (arXiv:2402.11296)."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from metier.core import preferencefit as fit
from metier.core.config import PartRef
from metier.core.errors import UsageError
from metier.core.part import Count, Index, Positive, part
from metier.core.probing import Probe
from metier.parts.probe._judges import Labels, choices
from metier.parts.probe._preferences import pairs, said
from metier.parts.probe._properties import differences

Array = np.ndarray


@part("probe/preference-properties", paper="arXiv:2402.11296", rows=(80,))
def preference_properties(
    probe: Probe,
    *,
    data: str | None = None,
    limit: Count | None = None,
    properties: list[str] | None = None,
    columns: list[str] | None = None,
    coding: Literal["sign", "standardised"] = "sign",
    labels: Labels = "data",
    judge: PartRef | None = None,
    pairwise: bool = False,
    judge_model: str | None = None,
    group: str | None = None,
    scale: Positive = 0.1,
    min_pairs: Count = 200,
    bootstrap: Index = 200,
    draws: Index = 250,
    seed: Index = 0,
) -> dict[str, Any]:
    """Weights ``α`` of ``P(chosen) = σ(d·α)``, ``d`` the signs of property differences, ``α_j ~ Laplace(0, scale)``.

    Pairs: ``data`` (a file, ``lab/…``), else the run's. Properties: those of the text (``properties``, default all of the
    catalogue) and ``columns`` NAME with ``NAME_chosen`` and ``NAME_rejected`` in the rows; ``-NAME`` where more is worse.
    Pairs without one of these are left out. ``coding: standardised``: differences in standard deviations; length then dominates.

    Who chooses: the data; a reward part ``judge`` (``pairwise``: it gives the probability that the first of two is better);
    a language model ``judge_model``, by the probabilities of the letters A and B; or the run (``labels: run``), by its reward
    model or implicit reward. Judges are asked in both orders: a bonus for a place cancels.

    For every property: ``alpha`` (maximum a posteriori), ``mean`` and ``sd`` of the posterior (``draws`` > 0), a bootstrap
    interval of 95 % (``bootstrap`` > 0, over prompts), ``preference`` σ(mean) with ½ for indifference, ``without_length`` (the
    same without that column, which may share its credit), and how often the answers differ. ``group``: a key of the rows by
    which it is fitted apart where there are ``min_pairs``. The paper lets a language model annotate 29 properties, which can
    be given as columns, and averages NUTS over ten fits on nine tenths of the pairs; here all pairs are used.
    """
    found = pairs(probe, data, limit)
    y = choices(
        probe, found, labels=labels, judge=judge, pairwise=pairwise, judge_model=judge_model, given=data is not None
    )  # fmt: skip
    d, names, kept = differences(found, properties, columns or (), coding)
    y, used = y[kept], [e for e, k in zip(found, kept, strict=True) if k]
    if not used:
        raise UsageError("no pair has all properties")
    how: dict[str, Any] = {"scale": scale, "draws": draws, "bootstrap": bootstrap, "seed": seed}
    prompts = [said(e.prompt) for e in used]
    whole = _fitted(d, y, names, prompts, **how)
    return {
        "pairs": len(used), "left_out": len(found) - len(used), "undecided": int((y == 0.5).sum()),
        "agrees_with_data": float(y.mean()), **whole,
        **({} if group is None else _groups(d, y, names, prompts, [e.meta.get(group) for e in used], min_pairs, how)),
        "warnings": _warnings(len(used), min_pairs, whole),
    }  # fmt: skip


def _fitted(
    d: Array, y: Array, names: Sequence[str], prompts: Sequence[str], *, scale: float, draws: int, bootstrap: int, seed: int
) -> dict[str, Any]:
    alpha = fit.l1_logistic(d, y, scale=scale)
    table = {"alpha": alpha, "differ": (d != 0).mean(0)}
    out: dict[str, Any] = {"explained": fit.explained(d, y, alpha)}
    if draws:
        posterior = fit.posterior_mean(d, y, scale=scale, draws=draws, seed=seed)
        table |= {"mean": posterior.mean, "sd": posterior.sd}
        out["sampler"] = {"rhat": posterior.rhat, "ess": posterior.ess, "acceptance": posterior.acceptance}
    if bootstrap:
        fits = fit.bootstrap(d, y, scale=scale, draws=bootstrap, seed=seed, clusters=prompts)
        table |= dict(zip(("low", "high"), np.quantile(fits, (0.025, 0.975), axis=0), strict=True))
        table["se"] = fits.std(0, ddof=1) if bootstrap > 1 else np.zeros(len(names))
    table["preference"] = 1 / (1 + np.exp(-table.get("mean", alpha)))
    if "length" in names and len(names) > 1:
        rest = [i for i, n in enumerate(names) if n != "length"]
        table["without_length"] = np.full(len(names), np.nan)
        table["without_length"][rest] = fit.l1_logistic(d[:, rest], y, scale=scale)
    rows = [
        {"property": n, **{k: None if np.isnan(v[j]) else float(v[j]) for k, v in table.items()}} for j, n in enumerate(names)
    ]
    return {**out, "properties": sorted(rows, key=lambda r: -abs(r["alpha"]))}


def _groups(
    d: Array, y: Array, names: Sequence[str], prompts: Sequence[str], groups: Sequence[Any], least: int, how: dict[str, Any]
) -> dict[str, Any]:
    """The same for every group with enough pairs; the others are named."""
    said = [str(g) for g in groups]
    counts = {g: said.count(g) for g in sorted(set(said))}
    fitted = {}
    for g in (g for g, n in counts.items() if n >= least):
        here = np.array([s == g for s in said])
        own = [p for p, h in zip(prompts, here, strict=True) if h]
        fitted[g] = {"pairs": counts[g], **_fitted(d[here], y[here], names, own, **how)}
    return {"groups": fitted, "small_groups": {g: n for g, n in counts.items() if n < least}}


def _warnings(pairs: int, least: int, whole: dict[str, Any]) -> list[str]:
    said = [f"only {pairs} pairs: the intervals are wide"] if pairs < least else []
    if "sampler" in whole and whole["sampler"]["rhat"] > 1.05:
        said.append(f"the chains disagree (R-hat {whole['sampler']['rhat']:.2f}): use more draws")
    return said


preference_properties.example = {"data": "lab/preferences", "limit": 150, "bootstrap": 5, "draws": 20}  # type: ignore[attr-defined]
