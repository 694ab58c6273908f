"""From a run file to bound parts: everything that can be refused before a model is loaded is refused here."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from metier.core import config, part
from metier.core.config import PartRef, Run
from metier.core.errors import UsageError
from metier.core.lossmodule import batch_type
from metier.core.part import Built, Option
from metier.core.yamlfile import Document


def _adapter_options(*, targets: str | list[str] | None = None) -> None:
    """Options of every adapter: which modules it is put on (globs, or ``all-linear``, ``attention``, ``mlp``)."""


def _no_options() -> None:
    """A kind without options of its own."""


def _common(kind: str) -> Callable[..., Any]:
    """The options that the core gives to every part of a kind, as a signature."""
    if kind == "optimizer":
        from metier.core.optim import common_options

        return common_options
    if kind == "schedule":
        from metier.core.schedule import common_options

        return common_options
    return _adapter_options if kind == "adapter" else _no_options


def common_schema(kind: str) -> dict[str, Option]:
    """The core's own options for a kind, by name."""
    return part.options(_common(kind))


@dataclass(frozen=True)
class Bound:
    """A part of a run: the part with its options, and the core's options for its kind."""

    built: Built
    common: dict[str, Any]


def bind(kind: str, ref: PartRef, where: Callable[[str], str] | None = None) -> Bound:
    """Bind a reference from a run file, separating the part's options from the core's."""
    name, given = part.split_ref(ref, where("") if where else kind)
    shared = common_schema(kind)
    obj = part.load(name, kind, where=where("") if where else None)
    card = obj.__metier__
    own = part.options(obj)
    merged = {**shared, **own}
    values = part.check_options(merged, given, owner=card.id, where=where)
    mine = {k: v for k, v in values.items() if k in own}
    common = {k: o.default for k, o in shared.items() if k not in own} | {
        k: v for k, v in values.items() if k in shared and k not in own
    }
    return Bound(part.build(kind, {name: mine}, where=where), common)


@dataclass(frozen=True)
class Resolved:
    """All parts of a run, bound and checked against each other."""

    run: Run
    document: Document
    objective: Bound
    optimizer: Bound
    schedule: Bound
    adapter: Bound | None
    source: Bound | None
    transforms: tuple[Bound, ...]
    hooks: tuple[Bound, ...]
    reads: type
    needs: frozenset[str]

    def parts(self) -> Iterator[Bound]:
        """Every part, in the order in which events reach them."""
        single = (self.source, self.objective, self.optimizer, self.schedule, self.adapter)
        yield from (b for b in (*self.transforms, *single, *self.hooks) if b is not None)


def resolve(run: Run, document: Document) -> Resolved:
    """Bind every part of ``run``. Raises ``UsageError`` with the place of the first problem."""

    def one(kind: str, ref: PartRef | None, *path: str | int) -> Bound | None:
        return None if ref is None else bind(kind, ref, config.place(document, *path))

    objective = one("objective", run.objective, "objective")
    optimizer = one("optimizer", run.optimizer, "optimizer")
    schedule = one("schedule", run.schedule, "schedule")
    assert objective is not None
    assert optimizer is not None
    assert schedule is not None
    result = Resolved(
        run, document, objective, optimizer, schedule,
        adapter=one("adapter", run.adapter, "adapter"),
        source=one("source", run.data.source, "data", "source"),
        transforms=tuple(bind("model", r, config.place(document, "transform", i)) for i, r in enumerate(run.transform)),
        hooks=tuple(bind("hook", r, config.place(document, "hooks", i)) for i, r in enumerate(run.hooks)),
        reads=batch_type(objective.built.obj),
        needs=frozenset(),
    )  # fmt: skip
    needs = frozenset().union(*(b.built.needs for b in result.parts()))
    _check_together(result, needs)
    return Resolved(**{**result.__dict__, "needs": needs})


def _check_together(r: Resolved, needs: frozenset[str]) -> None:
    present = {b.built.id for b in r.parts()}
    for b in r.parts():
        for other, reason in b.built.card.conflicts.items():
            if other in present:
                raise UsageError(f"{b.built.id} and {other} cannot be combined: {reason}", where=r.document.name)
    if "adapter" in needs and r.adapter is None:
        wanting = [b.built.id for b in r.parts() if "adapter" in b.built.needs]
        raise UsageError(f"{', '.join(wanting)} needs an adapter", where=r.document.name, hint="For example: adapter: lora")
    if "reference" not in r.objective.built.needs:
        for b in r.hooks:
            if "reference" in b.built.needs:
                raise UsageError(
                    f"{b.built.id} works on the reference model, which {r.objective.built.id} does not use",
                    where=r.document.where(("hooks",)),
                )
    train = r.run.train
    lengths = [k for k in ("steps", "epochs", "tokens") if getattr(train, k) is not None]
    if len(lengths) != 1:
        said = f"{' and '.join(lengths)} are both given" if lengths else "nothing is given"
        raise UsageError(
            f"say how long with one of train.steps, train.epochs, train.tokens ({said})", where=r.document.where(("train",))
        )


def describe(r: Resolved) -> dict[str, Mapping[str, Any]]:
    """The parts and all their options, defaults included, for ``run.json`` and ``plan``."""
    out: dict[str, Mapping[str, Any]] = {}
    for b in r.parts():
        target = part.load(b.built.id)
        defaults = {o.name: o.default for o in part.options(target).values() if o.default is not inspect.Parameter.empty}
        out[b.built.id] = {**defaults, **b.built.options, **b.common}
    return out
