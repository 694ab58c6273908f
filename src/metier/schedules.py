"""Every schedule as a function: ``cosine(final=0.1)`` gives ``f(clock) -> multiplier``; ``cosine(clock,
final=0.1)`` a value.

``metier.core.schedule.torch_scheduler(optimizer, cosine(final=0.1), steps=1000, warmup=0.1)`` makes a
``LambdaLR`` of it.
"""

import functools
from typing import Any

from metier.core.part import check_options, namespace, options


def _function(schedule: Any) -> Any:
    @functools.wraps(schedule)
    def call(clock: Any = None, **given: Any) -> Any:
        bound = functools.partial(schedule, **check_options(options(schedule), given, owner=schedule.__metier__.id))
        return bound if clock is None else bound(clock)

    return call


__getattr__, __dir__ = namespace("schedule", _function)
