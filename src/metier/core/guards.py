"""Stop, or skip, before a value that is not finite reaches the weights."""

import math
from collections.abc import Iterable
from typing import Any, Literal

from metier.core.errors import MetierError


class NonFiniteError(MetierError):
    """A loss or gradient was not finite and the run was told to stop. The weights are as before that step.

    ``event`` is the guard event: step, loss, gradient norm and the ids of the batch.
    """

    def __init__(self, event: dict[str, Any]) -> None:
        self.event = event
        super().__init__(str(event["text"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.event,)


class NonFinite:
    """Watches loss and gradient norm of every step, logged or not.

    ``policy`` is ``"stop"``, or ``"skip"``: the update is left out and training goes on, for at most
    ``max_skips`` steps in a row; the next one stops the run. A good step starts the count again.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", max_skips: int = 5) -> None:
        self.policy, self.max_skips = policy, max_skips
        self.skipped = 0
        """Steps skipped in a row so far."""

    def check(self, step: int, loss: float, norm: float, ids: Iterable[str]) -> dict[str, Any] | None:
        """``None`` for a good step, else the event to log; its ``action`` says what to do.

        ``step`` is the number of steps completed before this one; ``loss`` the mean over the whole batch,
        ``norm`` the global gradient norm before clipping; ``ids`` name the examples of the batch, of which
        the event keeps the first eight.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            return None
        ids = tuple(ids)
        skip = self.policy == "skip" and self.skipped < self.max_skips
        self.skipped += skip
        what = f"loss {loss:g}, gradient norm {norm:g} in the step after step {step}"
        return {
            "event": "guard", "kind": "nonfinite", "step": step, "loss": loss, "grad_norm": norm,
            "ids": list(ids[:8]), "action": "skip" if skip else "stop",
            "text": f"{what}; {self._consequence(skip)}. Batch: {_listed(ids)}",
        }  # fmt: skip

    def _consequence(self, skip: bool) -> str:
        if skip:
            return f"the update was skipped ({self.skipped} in a row, at most {self.max_skips})"
        after = f" after {self.skipped} skipped in a row" if self.policy == "skip" and self.skipped else ""
        return f"stopped{after}, the weights are as before it"


def _listed(ids: tuple[str, ...]) -> str:
    if not ids:
        return "unknown"
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
