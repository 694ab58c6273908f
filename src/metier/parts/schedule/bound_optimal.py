"""The schedule of least last-iterate bound (Defazio et al. 2023; Schaipp et al., arXiv:2501.18965), solved exactly."""

from functools import lru_cache
from typing import Annotated

from annotated_types import MinLen

from metier.core.clock import Clock
from metier.core.part import Positive, part


@part("schedule/bound-optimal", paper="arXiv:2501.18965", rows=(11,))
def bound_optimal(clock: Clock, *, grads: Annotated[tuple[Positive, ...], MinLen(1)] = (1.0,)) -> float:
    """The step sizes that minimise the bound ``Omega`` of ``metier.core.convexbound`` for this number of steps, peak 1.

    ``grads`` is the gradient norm over the run after warmup: values at equal distances from its first to its last step,
    straight lines in between, such as ``[3, 1, 0.8, 1.5]`` read off an earlier run's ``grad_norm``. Only their ratios matter.
    With constant norms the result is linear decay but for the last few steps, and its bound is 0.4 % below tuned linear decay
    at 400 steps; where norms are large the steps are small, about ``1/G²`` times a linear decay (Defazio et al.).

    The paper's scripts search by projected gradient descent. Here the optimum is exact: written in what is left of the step
    sizes, the bound is a chain whose links are minimised in closed form from the end (``convexbound.minimiser``). Of the
    ``steps + 1`` step sizes the last belongs to no update and is left out. The peak learning rate is that of linear decay,
    about twice that of a WSD with 20 % cooldown (``convexbound.transfer``).

    State: none. Cost: once per run, O(steps), 0.1 s for 1e5 steps; cached.
    """
    if clock.step >= clock.steps:
        return 0.0
    return _solved(clock.steps, grads)[clock.step]


@lru_cache(maxsize=16)
def _solved(steps: int, grads: tuple[float, ...]) -> tuple[float, ...]:
    import numpy as np

    from metier.core.convexbound import minimiser

    norms = np.array(grads if len(grads) > 1 else 2 * grads)
    profile = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(norms)), norms)
    best = minimiser(steps + 1, grads=profile)[:-1]
    return tuple((best / best.max()).tolist())
