"""All arms of a comparison ranked: the metric, and what each needs to reach the loss at which the control ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from metier.compare import stats, text
from metier.compare.results import ComparisonResult, RunResult, Tuning
from metier.compare.table import metric_text, searches

COLUMNS = ("arm", "final", "tokens to target", "time to target", "time per step", "optimizer state")
"""Of comparisons by the loss of one objective; those that keep further metrics show these instead of a race to a target."""


@dataclass(frozen=True)
class Place:
    """One arm. Ratios are relative to the control."""

    arm: str
    final: str
    """Mean and standard deviation of the metric."""
    mean: float | None
    tokens: float | None
    """Tokens until the mean over seeds reaches the target; ``None`` when it never does or a seed failed."""
    seconds: float | None
    """Training seconds until the target; ``None`` likewise."""
    step_ratio: float | None
    """Median time of a step."""
    state_ratio: float | None
    """Bytes of optimizer state."""
    at_edge: bool
    """Whether the tuned value lies at the edge of what was tried."""
    tried: str
    """How many values the search tried, and their range."""
    also: dict[str, float | None]
    """Means of the further metrics over the seeds that have them."""


def target(result: ComparisonResult) -> float | None:
    """The metric at which the control ends, on the mean over its seeds."""
    return stats.summary(result, result.control.name).mean


def places(result: ComparisonResult) -> list[Place]:
    """Every arm, best final value first; arms without one come last."""
    goal, control = target(result), result.finals(result.control.name)
    found = [_place(result, a.name, goal, control) for a in result.arms]
    sign = 1 if result.lower_is_better else -1
    return sorted(found, key=lambda p: (p.mean is None, sign * (p.mean or 0.0)))


def also(result: ComparisonResult) -> list[str]:
    """Names of the further metrics that its runs keep."""
    return list(dict.fromkeys(name for r in result.runs for name in r.also))


def columns(result: ComparisonResult) -> list[str]:
    """Heads of the table."""
    names = [n.replace("_", " ") for n in also(result)]
    heads: list[str] = ["arm", result.metric.replace("_", " "), *names] if names else list(COLUMNS)
    return [*heads, "values tried"] if result.widen else heads


def rows(result: ComparisonResult) -> list[list[str]]:
    """The table's cells, under :func:`columns`."""
    out, names = [], also(result)
    for p in places(result):
        edge = " (tuning at its edge)" if p.at_edge else ""
        tried = [p.tried] if result.widen else []
        if names:
            out.append([p.arm + edge, p.final, *(_number(p.also[n]) for n in names), *tried])
            continue
        tokens = "not reached" if p.tokens is None else f"{p.tokens / 1000:,.0f}k"
        seconds = "not reached" if p.seconds is None else f"{p.seconds:.1f} s"
        out.append([p.arm + edge, p.final, tokens, seconds, text.ratio(p.step_ratio), text.ratio(p.state_ratio), *tried])
    return out


def caption(result: ComparisonResult) -> str:
    """What the columns mean."""
    searched = f" {searches(result)}" if result.widen else ""
    if also(result):
        return f"Mean and standard deviation over seeds.{searched}"
    goal = target(result)
    reach = f"{result.metric} {goal:.4f}, at which {result.control.label} ends" if goal is not None else "no target"
    return f"Target: {reach}. Step time and state are relative to {result.control.label}.{searched}"


def markdown(result: ComparisonResult) -> str:
    """The leaderboard as a Markdown table."""
    heads = columns(result)
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows(result))])


def plain(result: ComparisonResult) -> str:
    """The leaderboard as aligned text."""
    body = [columns(result), *rows(result)]
    widths = [max(len(r[i]) for r in body) for i in range(len(body[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in body
    ]
    return "\n".join([*(line.rstrip() for line in lines), caption(result)])


def _place(result: ComparisonResult, arm: str, goal: float | None, control: Sequence[RunResult]) -> Place:
    finals = result.finals(arm)
    summary = stats.summary(result, arm)
    reached = _reach(finals, goal, result.lower_is_better)
    return Place(
        arm=arm, final=metric_text(summary, 4), mean=summary.mean,
        tokens=reached[0] if reached else None, seconds=reached[1] if reached else None,
        step_ratio=_over(_step_seconds(finals), _step_seconds(control)),
        state_ratio=_over(_state(finals), _state(control)),
        at_edge=any(t.at_edge for t in result.tuning if t.arm == arm),
        tried=next((_tried(t) for t in result.tuning if t.arm == arm), ""),
        also={name: _mean_of([r.also.get(name) for r in finals]) for name in also(result)},
    )  # fmt: skip


def _reach(runs: Sequence[RunResult], goal: float | None, lower: bool) -> tuple[float, float] | None:
    """Tokens and seconds at which the mean over seeds first reaches ``goal``, between two evaluations by a straight line."""
    curves = [r.eval_curve for r in runs if r.eval_curve is not None and not r.failed]
    if goal is None or not curves or len(curves) < len(runs) or len({len(c) for c in curves}) != 1:
        return None
    value, tokens, seconds = (np.mean([getattr(c, key) for c in curves], axis=0) for key in ("value", "tokens", "seconds"))
    above = (value - goal) * (1 if lower else -1)
    hits = np.flatnonzero(above <= 1e-12)
    if not len(hits):
        return None
    at = int(hits[0])
    share = 1.0 if at == 0 else float(above[at - 1] / (above[at - 1] - above[at]))
    first, last = max(at - 1, 0), at
    found = [float(x[first] + share * (x[last] - x[first])) for x in (tokens, seconds)]
    return found[0], found[1]


def _step_seconds(runs: Sequence[RunResult]) -> float | None:
    steps = [b - a for r in runs if not r.failed for a, b in zip(r.curve.seconds[:-1], r.curve.seconds[1:], strict=True)]
    return median(steps) if steps else None


def _state(runs: Sequence[RunResult]) -> float | None:
    return next((float(r.state_bytes) for r in runs if not r.failed), None)


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _tried(t: Tuning) -> str:
    return f"{len(t.values)}: {text.significant(min(t.values))} to {text.significant(max(t.values))}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
