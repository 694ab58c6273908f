"""The rule by which a search over one numeric option goes on beyond its grid; the same for every arm.

While the best value is an end of what was tried, the next value lies beyond that end, by the factor between the last two
values there: logarithmic spacing, as the grid has it. A trial that failed counts as the worst, so a value whose outer
neighbour diverged is inside.
"""

import math
from collections.abc import Sequence


def best(metric: Sequence[float | None], *, lower_is_better: bool) -> int | None:
    """Index of the best trial, of equal ones the first tried; ``None`` when all failed (``None`` or not finite)."""
    sign = 1 if lower_is_better else -1
    known = [(sign * m, i) for i, m in enumerate(metric) if m is not None and math.isfinite(m)]
    return min(known)[1] if known else None


def beyond(values: Sequence[float], metric: Sequence[float | None], *, lower_is_better: bool) -> float | None:
    """The value to try next: v_n · v_n / v_(n-1) outward of the best end, to six digits; ``None`` when the search is over.

    It is over when the best value is inside, when every trial failed, and where no factor is defined: fewer than two
    distinct values, or values that are not positive.
    """
    at = best(metric, lower_is_better=lower_is_better)
    ordered = sorted(set(values))
    if at is None or len(ordered) < 2 or ordered[0] <= 0 or values[at] not in (ordered[0], ordered[-1]):
        return None
    end, neighbour = ordered[:2] if values[at] == ordered[0] else (ordered[-1], ordered[-2])
    following = float(f"{end * (end / neighbour):.6g}")
    return following if math.isfinite(following) and following > 0 and following not in values else None
