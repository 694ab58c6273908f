"""Do preferences have cycles, and what policy do they leave? (arXiv:2503.10990)"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from metier.core import nash
from metier.core.batch import Pairs, Rewards
from metier.core.config import PartRef
from metier.core.data.examples import Preference, Ranked
from metier.core.data.formats import examples
from metier.core.data.rows import open_rows
from metier.core.errors import UsageError
from metier.core.part import Count, NonNegative, build, part
from metier.core.probing import Probe
from metier.parts.probe._judges import asked
from metier.parts.probe._preferences import pairs, said

Array = np.ndarray


@part("probe/condorcet", paper="arXiv:2503.10990", rows=(133,))
def condorcet(
    probe: Probe,
    *,
    data: str | None = None,
    limit: Count | None = None,
    judge: PartRef | None = None,
    pairwise: bool = False,
    over: str | None = None,
    prior: NonNegative = 0.5,
    shown: Count = 50,
) -> dict[str, Any]:
    """Cycles, Condorcet winners, Smith sets, Bradley-Terry residuals and Nash policies of preferences among answers.

    Read from ``data`` (default: the run's pairs): rows ``{prompt, completions, wins}``, where ``wins[i][j]`` counts how often i
    was preferred to j (or is a probability); lists, whose answers a ``judge`` (a reward part; ``pairwise``: it gives the
    probability that the first of two is better) compares in both orders, or else their scores; or pairs, which are counted,
    those of one prompt together. With ``over``, a key NAME with ``NAME_chosen`` and ``NAME_rejected`` in the rows of pairs, these
    names (models, say) are compared, over all prompts. ``prior`` wins are added to both sides of counts for log-odds.

    For every matrix: ``cycles`` of three, whether any cycle, its ``winner`` and ``loser``, the ``smith`` set, ``representable``
    (some reward orders all answers as majorities do), ``residual`` (share of the squared log-odds that no Bradley-Terry reward
    explains), ``rewards`` of the Bradley-Terry fit, the ``nash`` policy, and win rates against the worst opponent of the answer
    that the fit puts first and of the Nash policy. A reward part as judge is free of cycles unless it is ``pairwise``.
    Then means over all of them; ``shown`` are listed.
    """
    found = _matrices(probe, data, limit, judge, pairwise, over)
    rows = [_looked_at(*one, prior) for one in found]
    mean = {k: float(np.mean([float(r[k]) for r in rows])) for k in ("cyclic", "no_winner", "representable", "residual")}
    return {"matrices": len(rows), **mean, "rows": rows[:shown]}


def _looked_at(name: str, answers: Sequence[str], wins: Array, prior: float) -> dict[str, Any]:
    """All figures of one table of wins."""
    p, total = nash.from_wins(wins), wins + wins.T
    counts = bool((total > 1 + 1e-9).any() or np.allclose(wins, np.round(wins)))
    policy, rewards = nash.nash(p), nash.bt_fit(wins, ridge=1e-3)
    smooth = nash.from_wins(wins, prior=prior) if counts else p
    off = ~np.eye(len(p), dtype=bool)
    best, top = nash.winner(p), int(rewards.argmax())
    return {
        "name": name[:60], "answers": len(answers), "compared": float((total[off] > 0).mean()),
        "cycles": len(nash.cycles(p)), "cyclic": nash.has_cycle(p), "no_winner": best is None, "winner": best,
        "loser": nash.loser(p), "smith": nash.smith_set(p), "representable": nash.representable(p),
        "residual": nash.hodge_residual(smooth, weights=total)[1],
        "rewards": rewards.tolist(), "nash": policy.tolist(), "worst_of_first": float(p[top].min()),
        "worst_of_nash": nash.worst_win_rate(p, policy), "names": [a[:40] for a in answers],
    }  # fmt: skip


Table = tuple[str, list[str], Array]


def _matrices(
    probe: Probe, data: str | None, limit: int | None, judge: PartRef | None, pairwise: bool, over: str | None
) -> list[Table]:
    """``(name, answers, wins [K, K])`` of every prompt, or of all of them together."""
    if data is None and probe.reads not in (Pairs, Rewards):
        raise UsageError("the run's objective reads no preference pairs", hint="Give data: a file with comparisons.")
    if data is not None:
        rows = open_rows(data, limit=limit)
        if all("wins" in r for r in rows):
            return [_given(r, rows.where(i)) for i, r in enumerate(rows)]
        found: list[Any] = examples(rows)
        if isinstance(found[0], Ranked):
            return [_compared(e, judge, pairwise) for e in found]
    counted = _counted(pairs(probe, data, limit), over)
    if not counted:
        raise UsageError("no prompt has two compared answers")
    return counted


def _given(row: Mapping[str, Any], where: str) -> Table:
    try:
        wins = np.array(row["wins"], float)
        nash.from_wins(wins)
    except (TypeError, ValueError):
        raise UsageError("wins is no table of numbers", where=where) from None
    names = [str(c) for c in row.get("completions") or range(len(wins))]
    if len(names) != len(wins) or len(wins) < 2:
        raise UsageError(f"{len(names)} completions, but wins has {len(wins)} rows", where=where)
    return str(row.get("prompt", where)), names, wins * (1 - np.eye(len(wins)))


def _compared(e: Ranked, judge: PartRef | None, pairwise: bool) -> Table:
    """Probabilities among the answers of a list, averaged over both orders."""
    k, score = len(e.completions), np.asarray(e.scores, float)
    if judge is None:
        p = np.sign(score[:, None] - score[None]) / 2 + 0.5
    else:
        reward, each = build("reward", judge).obj, [(i, j) for i in range(k) for j in range(k) if i != j]
        shown = [[e.completions[i], e.completions[j]] for i, j in each]
        truth = e.meta.get("answer")
        truths = None if truth is None else [truth] * len(each)
        r = torch.as_tensor(reward(asked(reward, [e] * len(each)), shown, truths)).double()
        first = r[:, 0] if pairwise else torch.sigmoid(r[:, 0] - r[:, 1])
        p = np.full((k, k), 0.5)
        for (i, j), value in zip(each, first.tolist(), strict=True):
            p[i, j] = value
        p = (p + 1 - p.T) / 2
    return said(e.prompt), list(e.completions), p * (1 - np.eye(k))


def _counted(found: Sequence[Preference], over: str | None) -> list[Table]:
    """Wins among the answers to each prompt, or among the values of ``over``."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for e in found:
        sides = [e.chosen, e.rejected] if over is None else [e.meta.get(f"{over}_{s}") for s in ("chosen", "rejected")]
        if None not in sides and sides[0] != sides[1]:
            mine = tables.setdefault(said(e.prompt) if over is None else over, {})
            high, low = map(str, sides)
            mine.setdefault(high, {})[low] = mine.get(high, {}).get(low, 0.0) + 1
            mine.setdefault(low, {})
    return [(name, list(mine), np.array([[mine[a].get(b, 0.0) for b in mine] for a in mine])) for name, mine in tables.items()]


condorcet.example = {"data": "lab/preference-lists", "limit": 10}  # type: ignore[attr-defined]
