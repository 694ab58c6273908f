"""What the bound of ``core/convexbound.py`` advises about a run's schedule, before anything is trained."""

from typing import Any

from metier.core import convexbound, part
from metier.core.errors import UsageError
from metier.core.resolve import bind
from metier.core.schedule import Schedule


def advise(
    schedule: Any, steps: int, *, lr: float | None = None, warmup: float | None = None, tokens_per_step: float = 0.0,
    longer: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every schedule beside the given one: the factor for a tuned peak learning rate, and the bound relative to the best.

    ``lr`` is the peak tuned for ``schedule`` (1 when not given, so that factors are printed). With ``longer``, and a schedule
    that has a plateau, also the two ways of going on to so many steps with the same learning rate. Raises ``UsageError``
    when ``steps`` is below 2 or ``longer`` not above it.
    """
    if steps < 2 or (longer is not None and longer <= steps):
        raise UsageError(f"steps = {steps}, longer = {longer}: give at least 2 steps, and more to go on to")
    bound = bind("schedule", schedule)
    shared = {**bound.common, **({} if warmup is None else {"warmup": warmup})}
    own = convexbound.tuned(_values(bound.built, shared, steps, tokens_per_step))
    best = convexbound.tuned(convexbound.minimiser(steps))[1]
    rows = [_row(bound.built.id, own, own, best, lr)]
    for item in part.listing():
        if item.kind != "schedule" or item.id == bound.built.id:
            continue
        try:
            values = _values(part.build("schedule", item.name), shared, steps, tokens_per_step)
        except UsageError:  # needs to know more, such as tokens
            continue
        rows.append(_row(item.id, convexbound.tuned(values), own, best, lr))
    found: dict[str, Any] = {"steps": steps, "schedules": rows}
    if longer is not None:
        found["longer"] = _extended(bound.built, steps, longer)
    return found


def _values(built: part.Built, shared: dict[str, Any], steps: int, tokens_per_step: float) -> Any:
    return convexbound.multipliers(Schedule(built, **shared).at, steps, tokens_per_step=tokens_per_step)


def _row(id: str, found: tuple[float, float], own: tuple[float, float], best: float, lr: float | None) -> dict[str, Any]:
    factor = found[0] / own[0]
    return {"schedule": id, "lr": factor * (1.0 if lr is None else lr), "bound": found[1] / best}


def _extended(built: part.Built, steps: int, longer: int) -> dict[str, float]:
    options = getattr(built.obj, "keywords", {})
    cooldown, shape = options.get("decay", 0.2), options.get("shape", "linear")
    return {
        "cooldown": convexbound.extend_cooldown(steps, longer, cooldown, shape=shape),
        "plateau": convexbound.extend_plateau(steps, longer, cooldown, shape=shape),
        "plateau_from_step": (1 - cooldown) * steps,
    }
