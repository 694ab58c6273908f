"""How the contract suites get an instance of any part: its defaults, and something valid for what has
none."""

import typing
from collections.abc import Mapping
from typing import Any

from metier.core import part
from metier.core.part import Built, Option


def sample(id: str, **given: Any) -> Built:
    """The part ``kind/name`` with valid options.

    Options without a default are taken from the part's attribute ``example`` (a mapping) when it has one,
    else made from their types. Raises ``AssertionError`` when the result is refused: the part then needs an
    ``example``.
    """
    kind, name = id.split("/", 1)
    obj = part.load(id)
    example: Mapping[str, Any] = getattr(obj, "example", {})
    made = {o.name: value_of(o) for o in part.options(obj).values() if o.required}
    try:
        return part.build(kind, {name: {**made, **example, **given}})
    except part.UsageError as e:
        raise AssertionError(f"{id}: give it an attribute `example` with options that the suites can use ({e})") from e


def value_of(option: Option) -> Any:
    """A value of the option's type."""
    bare, marks = option.annotation, ()
    if typing.get_origin(bare) is typing.Annotated:
        bare, *marks = typing.get_args(bare)
    if typing.get_origin(bare) is typing.Literal:
        return typing.get_args(bare)[0]
    low = next((getattr(m, n) for m in marks for n in ("gt", "ge") if hasattr(m, n)), 0)
    simple: dict[Any, Any] = {float: low + 0.5, int: int(low) + 1, bool: False, str: "text"}
    return simple.get(bare)
