"""An objective inside another one: what the wrappers of this folder share."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metier.core import part
from metier.core.config import PartRef
from metier.core.errors import UsageError
from metier.core.lossmodule import batch_type, scores_again


class Nested:
    """The objective ``ref`` as option ``option`` of the objective ``owner``.

    Errors name both: ``objective/label-smoothing, of dpo, option beta``. Raises ``UsageError`` for an objective that does not
    read one of the batch types ``reads`` (any, when ``None``), or that scores the model by itself.
    """

    def __init__(self, owner: str, ref: PartRef, reads: tuple[type, ...] | None = None, option: str = "of") -> None:
        self.owner, self.option = owner, option
        self.name, _ = part.split_ref(ref, self._where(""))
        try:
            built = part.build("objective", ref, where=self._where)
        except UsageError as e:
            raise self._placed(e) from None
        self.id, self.obj = built.id, built.obj
        if scores_again(self.obj):
            raise UsageError(f"{self.id} scores the model by itself and cannot stand inside another objective", where=self.place)
        self.reads = batch_type(self.obj)
        self.needs, self.takes = built.needs, built.takes
        if reads is not None and self.reads not in reads:
            expected = " or ".join(r.__name__ for r in reads)
            raise UsageError(f"{self.id} reads {self.reads.__name__}, but {owner} changes {expected}", where=self.place)

    @property
    def place(self) -> str:
        """Where the nested objective stands, for error messages."""
        return f"{self.owner}, {self.option} {self.name}"

    def _where(self, option: str) -> str:
        known = getattr(self, "name", "")
        at = f"{self.owner}, {self.option} {known}" if known else f"{self.owner}.{self.option}"
        return f"{at}, option {option}" if option and option != known else at

    def _placed(self, e: UsageError) -> UsageError:
        """The error with this level in front of the place that an inner level gave it."""
        where = e.where or ""
        known = where.startswith(self.owner)
        return UsageError(e.what, where=where if known else ", ".join(filter(None, [self.place, where])), hint=e.hint)

    def __call__(self, b: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``[B]`` and metrics (none where the objective gives none). Its ``UsageError`` gets the place added."""
        try:
            result = self.obj(b)
        except UsageError as e:
            raise self._placed(e) from None
        return result if isinstance(result, tuple) else (result, {})

    def observe(self, b: Any) -> None:
        """Once per training step: the state of an objective that has one."""
        if hasattr(self.obj, "observe"):
            self.obj.observe(b)

    def advance(self, progress: float) -> None:
        """How much of the run is done, for an objective that asks."""
        if hasattr(self.obj, "progress"):
            self.obj.progress = progress

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; empty for an objective without."""
        return self.obj.state_dict() if hasattr(self.obj, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        if hasattr(self.obj, "load_state_dict"):
            self.obj.load_state_dict(state)


class Outer:
    """What an objective around others passes on: how far the run is, what it observes, their state."""

    parts: dict[str, Nested]
    _progress = 0.0

    @property
    def progress(self) -> float:
        """Share of the run that is done; the core sets it."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        self._progress = value
        for inner in self.parts.values():
            inner.advance(value)

    @property
    def takes(self) -> tuple[type, ...] | None:
        """Types of examples that every inner objective reads; ``None`` where none is particular."""
        said = [p.takes for p in self.parts.values() if p.takes is not None]
        return tuple(t for t in said[0] if all(t in other for other in said)) if said else None

    def _seen(self, b: Any) -> Any:
        """The batch as the inner objectives see it."""
        return b

    def observe(self, b: Any) -> None:
        """Once per training step: the state of the inner objectives, from the scores that they are given."""
        for inner in self.parts.values():
            inner.observe(self._seen(b))

    def state_dict(self) -> dict[str, Any]:
        """States of the inner objectives, by name."""
        return {name: inner.state_dict() for name, inner in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for name, inner in self.parts.items():
            inner.load_state_dict(state[name])


class Wrapper(Outer):
    """An objective around one other, whose needs and batch type it takes over."""

    inner: Nested

    def _around(self, inner: Nested) -> None:
        self.inner, self.reads, self.needs = inner, inner.reads, inner.needs
        self.parts = {inner.name: inner}
