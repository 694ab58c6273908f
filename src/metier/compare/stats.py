"""Paired differences by seed with their interval, and costs relative to the control.

A run that crashed or diverged is never dropped: it counts as the worst finite value that any run of the
comparison reached (tuning trials included) plus the range of all finite values (``penalty``). Leaving it out
would reward an arm for failing on the hard seeds.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from metier.compare.results import ComparisonResult, RunResult

LEVEL = 0.95
EXACT_LIMIT = 14
"""Most pairs for which all sign flips are enumerated."""
SAME = 1e-9
"""Differences whose spread is below this fraction of their size are the same number."""


@dataclass(frozen=True)
class Paired:
    """Differences *arm − control* per seed, in units of the metric."""

    arm: str
    control: str
    differences: tuple[float, ...]
    mean: float | None
    """``None`` when no run of the comparison has a value."""
    sd: float | None
    low: float | None
    high: float | None
    """Ends of the 95 % t-interval of the mean; ``None`` without an estimate of the spread."""
    p: float | None
    """Two-sided paired t-test."""
    p_signflip: float | None
    """Two-sided exact sign-flip test; it cannot be below 2 / 2^n."""
    p_holm: float | None
    """``p`` adjusted over all arms that are compared with the control."""
    failed: int
    failed_control: int

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.differences)

    @property
    def constant(self) -> bool:
        """Whether all differences are the same number, so that seeds show no spread."""
        return _constant(self.differences)


@dataclass(frozen=True)
class Costs:
    """What an arm's final runs took relative to the control's, on the seeds both finished, or ``None``."""

    time: float | None
    memory: float | None
    state: float | None
    tokens: float | None
    flops: float | None


@dataclass(frozen=True)
class Summary:
    """The finished final runs of one arm."""

    mean: float | None
    sd: float | None
    finished: int
    planned: int

    @property
    def failed(self) -> int:
        """Number of runs without a final value."""
        return self.planned - self.finished


def paired(result: ComparisonResult) -> list[Paired]:
    """The differences of every arm from the control, in the order of the arms."""
    found = [_pair(result, arm.name) for arm in result.challengers]
    adjusted = iter(holm([f.p for f in found if f.p is not None]))
    return [replace(f, p_holm=None if f.p is None else next(adjusted)) for f in found]


def _pair(result: ComparisonResult, arm: str) -> Paired:
    control = result.control.name
    ours, theirs = values(result, arm), values(result, control)
    worst = penalty(result)
    failed, failed_control = (sum(v is None for v in vs) for vs in (ours, theirs))
    if worst is None:
        return Paired(arm, control, (), None, None, None, None, None, None, None, failed, failed_control)
    differences = tuple((worst if a is None else a) - (worst if c is None else c) for a, c in zip(ours, theirs, strict=True))
    low, high = interval(differences)
    return Paired(
        arm, control, differences, float(np.mean(differences)), _sd(differences), low, high,
        p_value(differences), p_signflip(differences), None, failed, failed_control,
    )  # fmt: skip


def values(result: ComparisonResult, arm: str) -> list[float | None]:
    """Final metric of an arm per seed; ``None`` for a run that failed or is missing."""
    by_seed = {r.seed: r for r in result.finals(arm)}
    return [None if s not in by_seed or by_seed[s].failed else by_seed[s].metric for s in result.seeds]


def strict_mean(result: ComparisonResult, arm: str) -> float:
    """Mean final metric of an arm; infinite when a run failed or is missing: what studies of a loss count with."""
    found = values(result, arm)
    ran = [v for v in found if v is not None]
    return sum(ran) / len(ran) if ran and len(ran) == len(found) else math.inf


def penalty(result: ComparisonResult) -> float | None:
    """What a failed run counts as: the worst finite value of any run, worsened by the range of all of them.

    A single distinct value has no range: its own size (or 1 for zero) stands in. ``None`` without any value.
    """
    finite = [r.metric for r in result.runs if not r.failed and r.metric is not None]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    spread = (high - low) or abs(high) or 1.0
    return high + spread if result.lower_is_better else low - spread


def interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float | None, float | None]:
    """The t-interval of the mean: m ± t(n − 1) · s / √n.

    ``(0, 0)`` when all differences are zero; ``(None, None)`` for fewer than two, or when all are the same
    number other than zero: no spread says that the seeds do not vary, not that the mean is known exactly.
    """
    from scipy.stats import t

    n = len(differences)
    if n >= 2 and not np.any(differences):
        return 0.0, 0.0
    if n < 2 or _constant(differences):
        return None, None
    mean = float(np.mean(differences))
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def p_value(differences: Sequence[float]) -> float | None:
    """Two-sided paired t-test against no difference; ``None`` where the spread cannot be estimated."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or _constant(differences):
        return 1.0 if len(differences) >= 2 and not np.any(differences) else None
    _, p = ttest_1samp(np.asarray(differences), 0.0)
    return float(np.asarray(p))


def p_signflip(differences: Sequence[float]) -> float | None:
    """Share of all 2^n sign assignments whose |mean| reaches the observed one; ``None`` beyond 14 pairs."""
    n = len(differences)
    if not 1 <= n <= EXACT_LIMIT:
        return None
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    means = np.abs(signs @ np.asarray(differences, dtype=float))
    observed = means[0]
    return float(np.mean(means >= observed * (1 - 1e-12)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def summary(result: ComparisonResult, arm: str) -> Summary:
    """Mean and standard deviation over the seeds that finished."""
    finished = [v for v in values(result, arm) if v is not None]
    mean = float(np.mean(finished)) if finished else None
    return Summary(mean, _sd(finished), len(finished), len(result.seeds))


def costs(result: ComparisonResult, arm: str) -> Costs:
    """Cost ratios *arm / control*: means over the seeds that both finished."""
    theirs = {r.seed: r for r in result.finals(result.control.name) if not r.failed}
    pairs = [(r, theirs[r.seed]) for r in result.finals(arm) if not r.failed and r.seed in theirs]

    def of(cost: Callable[[RunResult], float]) -> float | None:
        above, below = sum(cost(a) for a, _ in pairs), sum(cost(c) for _, c in pairs)
        return above / below if below > 0 else None

    return Costs(
        time=of(lambda r: r.seconds), memory=of(lambda r: r.peak_bytes), state=of(lambda r: r.state_bytes),
        tokens=of(lambda r: r.tokens), flops=of(lambda r: r.flops),
    )  # fmt: skip


def _sd(numbers: Sequence[float]) -> float | None:
    return float(np.std(numbers, ddof=1)) if len(numbers) >= 2 else None


def _constant(numbers: Sequence[float]) -> bool:
    return len(numbers) > 0 and float(np.ptp(numbers)) <= SAME * float(np.max(np.abs(numbers)))
