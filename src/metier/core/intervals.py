"""95 % intervals of shares and means."""

import numpy as np
from scipy import stats

Z95 = float(stats.norm.ppf(0.975))


def wilson(wins: float, number: int) -> tuple[float, float]:
    """Interval of a share ``wins / number`` (Wilson, 1927); ties may count halves."""
    share, z2 = wins / number, Z95**2 / number
    half = Z95 * float(np.sqrt(share * (1 - share) / number + z2 / (4 * number)))
    return (share + z2 / 2 - half) / (1 + z2), (share + z2 / 2 + half) / (1 + z2)


def student(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of a mean; a point where there is nothing to tell the spread by."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return float(low), float(high)
