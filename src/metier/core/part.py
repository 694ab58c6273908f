"""Parts: techniques found by their path.

``parts/<kind>/<name>.py`` holds one object decorated with :func:`part`. Looking up ``optimizer/lion`` imports
``metier.parts.optimizer.lion`` and nothing else; listing reads the files with ``ast`` and imports nothing.
Third parties register through the entry-point group ``metier.parts`` (name ``kind/name``, value ``module:object``).

The keyword-only arguments of a part are its options: typed, documented, validated strictly.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt

from metier.core.errors import UsageError, unknown

KINDS = (
    "optimizer", "schedule", "adapter", "objective", "source", "reward",
    "model", "merge", "decode", "hook", "probe", "law",
)  # fmt: skip
NEEDS = {
    "closure": "re-evaluates the loss inside the optimizer step",
    "reference": "log-probabilities under a frozen reference model",
    "policy": "samples from the model being trained",
    "metadata": "examples that carry a metadata field",
    "base": "the base model that the merged models came from",
    "adapter": "low-rank factor pairs of an adapter",
    "logits": "whole logit rows of the positions that carry loss",
    "tokens": "scores of every token of the answers, not only their sums",
    "collision": "log Σ p² of the distributions that predict the answers' tokens",
    "samples": "further answers per prompt, sampled from the reference model",
    "mismatch": "an answer of another prompt beside each answer",
    "batch": "the whole step at once, over micro-batches and processes, since its loss is not a sum over units",
}
ROOT = Path(__file__).resolve().parent.parent / "parts"
T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """What a paper says, as data: ``compare`` tests it, the card prints it, a finding answers it."""

    text: str
    metric: str
    against: str
    """Part id of the control arm, e.g. ``optimizer/adamw``."""
    lower_is_better: bool = True
    minimum_effect: float = 0.0
    """In units of the metric; an interval beyond it is *holds*, one that only excludes 0 is *direction*."""
    figure: str = ""
    """The paper's own number, as it reports it."""


@dataclass(frozen=True)
class Named:
    """Something with the id ``kind/name`` of a part."""

    id: str

    @property
    def kind(self) -> str:
        """The part before the slash."""
        return self.id.split("/")[0]

    @property
    def name(self) -> str:
        """The part behind the slash."""
        return self.id.split("/")[1]


@dataclass(frozen=True)
class Card(Named):
    """What a part declares about itself."""

    paper: str
    rows: tuple[int, ...] = ()
    claim: Claim | None = None
    needs: frozenset[str] = frozenset()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    """Part id -> reason, for combinations that are refused before anything runs."""


def part(
    id: str,
    *,
    paper: str,
    rows: tuple[int, ...] = (),
    claim: Claim | None = None,
    needs: tuple[str, ...] = (),
    conflicts: Mapping[str, str] | None = None,
) -> Callable[[T], T]:
    """Declare a class or function as the part ``kind/name``; ``paper`` is the source, ``rows`` the reading-list rows."""
    kind, _, name = id.partition("/")
    if kind not in KINDS or not name:
        raise UsageError(f"part id {id!r} must be one of {', '.join(KINDS)}, a slash, and a name")
    for need in needs:
        if need not in NEEDS:
            raise unknown("need", need, NEEDS, where=id)
    card = Card(id, paper, tuple(rows), claim, frozenset(needs), dict(conflicts or {}))

    def decorate(obj: T) -> T:
        _check_signature(id, obj)
        obj.__metier__ = card  # type: ignore[attr-defined]
        return obj

    return decorate


def _check_signature(id: str, obj: Any) -> None:
    for p in inspect.signature(obj).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            raise UsageError(f"part {id} takes **{p.name}: options must be declared one by one")
        if p.kind is p.KEYWORD_ONLY and p.annotation is p.empty:
            raise UsageError(f"option {p.name!r} of part {id} has no type")


# --- listing without importing -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing(Named):
    """One part as its source file shows it, read without importing it."""

    object: str
    """Name of the decorated class or function."""
    path: str
    module: str
    summary: str
    paper: str
    rows: tuple[int, ...]


@cache
def listing() -> tuple[Listing, ...]:
    """Every part: built in (read with ``ast``) and from entry points. Raises ``UsageError`` on a duplicate id."""
    found: dict[str, Listing] = {}
    for item in [*_builtin(), *_third_party()]:
        if item.id in found:
            raise UsageError(f"two parts are called {item.id}: {found[item.id].path} and {item.path}")
        found[item.id] = item
    return tuple(sorted(found.values(), key=lambda i: (KINDS.index(i.kind), i.name)))


def _builtin() -> Iterator[Listing]:
    for path in sorted(ROOT.glob("*/*.py")):
        if not path.name.startswith("_"):
            yield from read_file(path, f"metier.parts.{path.parent.name}.{path.stem}")


def _third_party() -> Iterator[Listing]:
    for point in entry_points(group="metier.parts"):
        spec = importlib.util.find_spec(point.module)
        if spec is None or spec.origin is None:
            raise UsageError(f"entry point {point.name!r} names the module {point.module!r}, which cannot be found")
        yield from (i for i in read_file(Path(spec.origin), point.module) if i.id == point.name)


def read_file(path: Path, module: str) -> Iterator[Listing]:
    """The parts declared in one source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "part":
                    yield _listing(node, call, path, module)


def _listing(node: ast.ClassDef | ast.FunctionDef, call: ast.Call, path: Path, module: str) -> Listing:
    given = {k.arg: k.value for k in call.keywords}
    doc = ast.get_docstring(node) or ""
    return Listing(
        id=ast.literal_eval(call.args[0]),
        object=node.name,
        path=str(path),
        module=module,
        summary=" ".join(doc.split("\n\n")[0].split()),
        paper=ast.literal_eval(given["paper"]),
        rows=tuple(ast.literal_eval(given["rows"])) if "rows" in given else (),
    )


def find(ref: str, kind: str | None = None, *, where: str | None = None) -> Listing:
    """The listing of ``kind/name`` (or ``name`` with ``kind`` given); underscores and dashes are the same."""
    wanted = ref.replace("_", "-").lower()
    if "/" not in wanted:
        wanted = f"{kind}/{wanted}" if kind else wanted
    for item in listing():
        if item.id == wanted or (kind is None and item.name == wanted):
            return item
    if kind is not None:
        names = [i.name for i in listing() if i.kind == kind]
        raise unknown(kind, ref, names, where=where, more=f"See: metier list {kind}")
    raise unknown("part", ref, [i.id for i in listing()] + [i.name for i in listing()], where=where)


def load(ref: str, kind: str | None = None, *, where: str | None = None) -> Any:
    """Import and return the object of a part; only its own module is imported."""
    item = find(ref, kind, where=where)
    return getattr(importlib.import_module(item.module), item.object)


# --- options: the signature is the schema --------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One keyword-only argument of a part."""

    name: str
    annotation: Any
    default: Any
    required: bool

    def check(self, value: Any, where: str) -> Any:
        """``value`` converted to the option's type. Raises ``UsageError`` naming the option and the reason."""
        from pydantic import TypeAdapter, ValidationError

        adapter = TypeAdapter(self.annotation)
        try:
            return adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as e:
            reason = e.errors()[0]["msg"]
        except (TypeError, ValueError):
            try:
                return adapter.validate_python(value)
            except ValidationError as e:
                reason = e.errors()[0]["msg"]
        raise UsageError(f"{self.name} = {value!r}: {reason[0].lower()}{reason[1:]}", where=where)


def options(obj: Any) -> dict[str, Option]:
    """The options of a part, in order, by name."""
    target = obj.__init__ if inspect.isclass(obj) else obj
    hints = typing.get_type_hints(target, include_extras=True)
    return {
        p.name: Option(p.name, hints.get(p.name, p.annotation), p.default, p.default is p.empty)
        for p in inspect.signature(obj).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


def check_options(
    schema: Mapping[str, Option], given: Mapping[str, Any], *, owner: str, where: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """``given`` validated against ``schema``; ``where`` maps an option name to its place in the user's file."""
    place = where or (lambda key: f"{owner}.{key}")
    for key in given:
        if key not in schema:
            kind, _, name = owner.partition("/")
            raise unknown(f"option of {owner}", key, schema, where=place(key), more=f"See: metier show {kind}/{name}")
    checked = {key: schema[key].check(value, place(key)) for key, value in given.items()}
    missing = [o.name for o in schema.values() if o.required and o.name not in given]
    if missing:
        raise UsageError(f"{owner} needs {', '.join(missing)}", where=place(""))
    return checked


@dataclass(frozen=True)
class Built:
    """A part with its options bound: ``obj`` is an instance (classes) or a ``functools.partial`` (functions)."""

    id: str
    card: Card
    obj: Any
    options: dict[str, Any]

    @property
    def needs(self) -> frozenset[str]:
        """What the part cannot work without, out of ``NEEDS``: its own attribute where options decide, else the card's."""
        return frozenset(getattr(self.obj, "needs", self.card.needs))

    @property
    def takes(self) -> tuple[type, ...] | None:
        """The only types of examples that the part reads, where it says so by an attribute ``takes``."""
        return getattr(self.obj.func if isinstance(self.obj, partial) else self.obj, "takes", None)


def build(kind: str, ref: str | Mapping[str, Any], *, where: Callable[[str], str] | None = None) -> Built:
    """Bind a reference — ``"lion"`` or ``{"lion": {"beta1": 0.9}}`` — to its part with validated options.

    Classes whose constructor takes positional arguments (an adapter takes its base layer) are bound as a
    ``functools.partial`` of the class.
    """
    name, given = split_ref(ref, where("") if where else kind)
    obj = load(name, kind, where=where(name) if where else None)
    card: Card = obj.__metier__
    bound = check_options(options(obj), given, owner=card.id, where=where)
    instantiate = inspect.isclass(obj) and not _takes_positional(obj)
    return Built(card.id, card, obj(**bound) if instantiate else partial(obj, **bound), bound)


def _takes_positional(cls: type) -> bool:
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in inspect.signature(cls).parameters.values())


def split_ref(ref: Any, where: str) -> tuple[str, dict[str, Any]]:
    """``"lion"`` -> ``("lion", {})``; ``{"lion": {...}}`` -> ``("lion", {...})``."""
    if isinstance(ref, str):
        return ref, {}
    if isinstance(ref, Mapping) and len(ref) == 1:
        ((name, given),) = ref.items()
        if given is None:
            return str(name), {}
        if isinstance(given, Mapping):
            return str(name), dict(given)
    raise UsageError(f"expected a name or {{name: {{option: value}}}}, got {ref!r}", where=where)


def namespace(kind: str, wrap: Callable[[Any], Any] = lambda obj: obj):
    """``__getattr__`` and ``__dir__`` of a module such as ``metier.objectives``: parts by their object's name."""

    @cache
    def get(name: str) -> Any:
        for item in listing():
            if item.kind == kind and item.object == name:
                return wrap(getattr(importlib.import_module(item.module), name))
        raise AttributeError(f"metier has no {kind} called {name!r}; see: metier list {kind}")

    return get, lambda: sorted(i.object for i in listing() if i.kind == kind)


# --- option types that recur -----------------------------------------------------------------------------------

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Beta = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]
