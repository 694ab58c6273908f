"""F20: every option of every part misspelt, of the wrong type, out of range, or null: one line, before any model loads."""

import typing

import pytest
from annotated_types import Ge, Gt

from metier.core import config, part, resolve
from metier.core.errors import UsageError

BASE = {"model": "lab/llama-50k", "data": {"train": "lab/pydoc"}, "train": {"steps": 1}}
PLACES = {
    "optimizer": lambda ref: {"optimizer": ref}, "schedule": lambda ref: {"schedule": ref}, "adapter": lambda ref: {"adapter": ref},
    "objective": lambda ref: {"objective": ref}, "hook": lambda ref: {"hooks": [ref]}, "model": lambda ref: {"transform": [ref]},
    "source": lambda ref: {"data": {"train": "lab/pydoc", "source": ref}},
}  # fmt: skip
CASES = [
    (item.id, name)
    for item in part.listing()
    if item.kind in PLACES
    for name in (*part.options(part.load(item.id)), *resolve.common_schema(item.kind))
]


def refused(kind, ref):
    run = {**BASE, **PLACES[kind](ref)}
    with pytest.raises(UsageError) as caught:
        settings, document = config.load(run)
        resolve.resolve(settings, document)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


@pytest.mark.parametrize(("id", "name"), CASES)
def test_misspelt(id, name):
    kind, short = id.split("/")
    message = refused(kind, {short: {name + "x": 1}})
    assert f"unknown option of {id} '{name}x'" in message
    assert f"Did you mean {name!r}?" in message


@pytest.mark.parametrize(("id", "name"), CASES)
def test_wrong_type(id, name):
    kind, short = id.split("/")
    message = refused(kind, {short: {name: [["not", {"a": "value"}]]}})
    assert name in message


def bounded():
    for id, name in CASES:
        option = part.options(part.load(id)).get(name)
        if option is not None and typing.get_origin(option.annotation) is typing.Annotated:
            below = any(isinstance(b, Ge | Gt) for b in option.annotation.__metadata__)
            yield id, name, -1e9 if below else 1e9


@pytest.mark.parametrize(("id", "name", "value"), list(bounded()))
def test_out_of_range(id, name, value):
    kind, short = id.split("/")
    assert name in refused(kind, {short: {name: value}})


@pytest.mark.parametrize("kind", PLACES)
def test_unknown_part(kind):
    some = next(i.name for i in part.listing() if i.kind == kind)
    assert f"Did you mean {some!r}?" in refused(kind, some + "x")


@pytest.mark.parametrize(("id", "name"), CASES)
def test_null(id, name):
    """Null is either a value of the option's type or refused with its name; it never passes silently as something else."""
    kind, short = id.split("/")
    option = (part.options(part.load(id)) | dict(resolve.common_schema(kind)))[name]
    if type(None) in typing.get_args(option.annotation):
        assert option.check(None, name) is None
    else:
        assert name in refused(kind, {short: {name: None}})
