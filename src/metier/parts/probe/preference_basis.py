"""Few categories that explain most preferences, and what follows from them (arXiv:2503.24150)."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Lt

from metier.core import preferencefit as fit
from metier.core.config import PartRef
from metier.core.data.examples import Preference
from metier.core.errors import unknown
from metier.core.part import Count, Fraction, Index, part
from metier.core.probing import Probe
from metier.parts.probe._judges import Labels, choices
from metier.parts.probe._preferences import pairs, said
from metier.parts.probe._properties import differences

Array = np.ndarray


@part("probe/preference-basis", paper="arXiv:2503.24150", rows=(138,))
def preference_basis(
    probe: Probe,
    *,
    data: str | None = None,
    limit: Count | None = None,
    properties: list[str] | None = None,
    columns: list[str] | None = None,
    labels: Labels = "data",
    judge: PartRef | None = None,
    pairwise: bool = False,
    judge_model: str | None = None,
    target: Fraction = 0.89,
    most: Count | None = None,
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.3,
    topic: str | None = None,
    model: str | None = None,
    category: str | None = None,
    min_pairs: Count = 200,
    bootstrap: Index = 100,
    seed: Index = 0,
) -> dict[str, Any]:
    """The fewest categories that explain ``target`` of what all explain, chosen greedily, with their weights and ratings.

    Categories are signs of property differences, of the catalogue (``properties``) and of the rows (``columns``), as in
    probe/preference-properties, judges too. Explained variation is ``1 - Dev(logistic) / Dev(coin)``, no intercept, on pairs
    of ``held_out`` prompts; the selection sees the others only, and ends too where no category does better than chance. That
    of all categories has an L1 penalty chosen by cross-validation. ``coverage``: the share of pairs whose chosen answer some
    category favours. ``attributed``: pairs that no other category explains better.

    ``topic``: a key of the rows by which weights are fitted again, with the singular values of topics times categories
    (few large ones: one taste). ``model``: a key NAME with ``NAME_chosen`` and ``NAME_rejected``, the models that answered;
    for every category, Elo ratings of which model it favours, over pairs where it favours one, with intervals of 95 %.
    ``category``: give the ids of the pairs attributed to it, to train on. The paper has a language model write reasons and
    names clusters of them as categories; here they are counted or given. Its own selection is not known.
    """
    found = pairs(probe, data, limit)
    y = choices(
        probe, found, labels=labels, judge=judge, pairwise=pairwise, judge_model=judge_model, given=data is not None
    )  # fmt: skip
    m, names, kept = differences(found, properties, columns or ())
    y, used = y[kept], [e for e, k in zip(found, kept, strict=True) if k]
    out = _some_prompts(used, held_out, seed)
    basis = fit.greedy(m, y, out, target=target, most=most)
    own, chosen = m[:, basis.columns], [names[j] for j in basis.columns]
    if category is not None and category not in chosen:
        raise unknown("chosen category", category, chosen, where="category")
    owed = [fit.attributed(own, y, k, basis.alpha) for k in range(len(chosen))]
    return {
        "pairs": len(used), "left_out": len(found) - len(used), "held_out": int(out.sum()), "all": len(names),
        "full": basis.full, "share": basis.share, "reached": basis.share is not None and basis.share >= target,
        "categories": [
            {"category": c, "weight": float(basis.alpha[k]), "fitted": basis.fitted[k], "held_out": basis.held_out[k],
             "coverage": basis.coverage[k], "attributed": int(owed[k].sum())}
            for k, c in enumerate(chosen)
        ],
        **({} if topic is None else _topics(own, y, [str(e.meta.get(topic)) for e in used], chosen, min_pairs)),
        **({} if model is None else {"elo": _ratings(own, used, model, chosen, min_pairs, bootstrap, seed)}),
        **({} if category is None else {"ids": [e.id for e, o in zip(used, owed[chosen.index(category)], strict=True) if o]}),
    }  # fmt: skip


def _some_prompts(used: Sequence[Preference], share: float, seed: int) -> Array:
    """Which pairs belong to a random ``share`` of the prompts."""
    names, member = np.unique([said(e.prompt) for e in used], return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    return np.isin(member, order[: round(share * len(names))])


def _topics(m: Array, y: Array, topics: Sequence[str], chosen: Sequence[str], least: int) -> dict[str, Any]:
    """Weights of every topic with enough pairs, and the singular values of their table."""
    counts = {t: topics.count(t) for t in sorted(set(topics))}
    large = [t for t, n in counts.items() if n >= least]
    table = np.array([fit.l1_logistic(m[np.array(topics) == t], y[np.array(topics) == t]) for t in large])
    values = np.linalg.svd(table, compute_uv=False) if table.size else np.zeros(0)
    share = np.cumsum(values**2) / max(1e-300, float((values**2).sum()))
    return {
        "topics": [
            {"topic": t, "pairs": counts[t], **dict(zip(chosen, row, strict=True))}
            for t, row in zip(large, table.tolist(), strict=True)
        ],
        "small_topics": {t: n for t, n in counts.items() if n < least},
        "singular_values": values.tolist(), "explained_by_rank": share.tolist(),
    }  # fmt: skip


def _ratings(
    m: Array, used: Sequence[Preference], model: str, chosen: Sequence[str], least: int, bootstrap: int, seed: int
) -> list[dict[str, Any]]:
    """Elo of every category and model; ``few`` where less than ``least`` pairs speak."""
    names = [[str(e.meta.get(f"{model}_{side}")) for side in ("chosen", "rejected")] for e in used]
    rows, rng = [], np.random.default_rng(seed)
    for k, category in enumerate(chosen):
        here = [i for i, v in enumerate(m[:, k]) if v != 0 and "None" not in names[i] and names[i][0] != names[i][1]]
        if not here:
            continue
        first, second = ([names[i][side] for i in here] for side in (0, 1))
        models, outcome = sorted({*first, *second}), (m[here, k] > 0).astype(float)
        rating = fit.elo(first, second, outcome, models)
        drawn = [
            fit.elo(first, second, outcome, models, weights=rng.multinomial(len(here), np.full(len(here), 1 / len(here))))
            for _ in range(bootstrap)
        ]
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0) if drawn else (rating, rating)
        rows += [
            {"category": category, "model": models[i], "elo": float(rating[i]), "low": float(low[i]), "high": float(high[i]),
             "pairs": len(here), "few": len(here) < least}
            for i in np.argsort(-rating)
        ]  # fmt: skip
    return rows


preference_basis.example = {"data": "lab/preferences", "limit": 300, "bootstrap": 2}  # type: ignore[attr-defined]
