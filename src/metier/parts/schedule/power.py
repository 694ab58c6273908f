"""Power scheduler: the learning rate is a power of the tokens seen, times the batch (Shen et al., arXiv:2408.13359)."""

import math
from typing import Annotated

from annotated_types import Ge, Le

from metier.core.clock import Clock
from metier.core.cooldown import Shape, fall, into_cooldown
from metier.core.errors import UsageError
from metier.core.part import Fraction, Positive, part

SEQUENCE = 4096
"""Tokens of a sequence in the unit of the batch: ``a`` was fitted with these."""


@part("schedule/power", paper="arXiv:2408.13359", rows=(3,))
def power(
    clock: Clock,
    *,
    a: Positive = 4.0,
    b: Annotated[float, Ge(-2), Le(0)] = -0.51,
    eta_max: Positive = 0.02,
    decay: Fraction = 0.1,
    shape: Shape = "exponential",
) -> float:
    """``lr(n) = min(eta_max, beta a n^b)`` with n tokens seen and beta = tokens of a step / 4096; a short decay to 0 at the end.

    A schedule is a multiplier of the optimizer's ``lr``, so **set the optimizer's lr to** ``eta_max``: the value here is
    ``min(1, beta a n^b / eta_max)``. Nothing before the decay depends on the length of the run. Over the last ``decay`` of the
    run (after warmup, as for ``wsd``) it is ``shape(y)``, y from 0 to 1, times the value where that stretch began.

    - n: real tokens consumed before this update, over resumes and changes of data. At n = 0 the power is infinite: the cap.
    - beta: the effective batch of an optimizer step, all micro-batches and processes, in sequences of 4096 tokens. Twice the
      batch means twice the rate at the same n, not at the same step.
    - warmup: the core's ``warmup`` goes linearly to the value at its own end, ``(n / N_w) lr(N_w)``.
    - the cap is left at ``n* = (beta a / eta_max)^(-1/b)``: 3.3e4 tokens for beta 1, 4.4e8 for 128. Runs shorter than that
      have a constant rate.

    ``a`` between 3 and 5 and ``b`` between -0.52 and -0.51 are equally good in the paper, for AdamW with muP (``model/mup``);
    other optimizers need their own ``a`` (``metier fit law/power-lr``). State: none. Cost: none.

    Raises ``UsageError`` when the tokens of a step are not known.

    Differs from the released engine: there ``beta a`` is one number, the steps are counted and multiplied by a fixed number of
    tokens, and the decay is a second run. The paper calls the decay exponential and prints no formula; the ``exponential``
    used here, ``(e^(1-y) - 1) / (e - 1)``, is the engine's own exponential schedule with floor 0.
    """
    if clock.tokens_per_step <= 0:
        raise UsageError(
            "the power schedule needs to know how many tokens a step has, and here it is 0",
            where="schedule/power",
            hint="In a loop of your own, give torch_scheduler(tokens_per_step=…).",
        )
    beta = clock.tokens_per_step / SEQUENCE
    y = into_cooldown(clock.step, clock.steps, decay)
    # Where the decay began is asked in tokens; steps since then are turned into tokens by their expected number.
    since = max(0.0, y) * decay * clock.steps
    n = max(0.0, clock.tokens - since * clock.tokens_per_step)
    level = 1.0 if n == 0 and b < 0 else min(1.0, beta * a * math.pow(n, b) / eta_max)
    return level * fall(shape, y)
