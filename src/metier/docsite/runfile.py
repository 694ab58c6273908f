"""The page of the run file and the design file, read from their schemas."""

from typing import Any

from metier.docsite.text import default_text, docstring, escape, table, type_text

INTRO = (
    "What a YAML file may hold. Every key is checked before a model is loaded: an unknown key, a wrong type or a value "
    "out of range is an error with file, line and the nearest valid name. Where a *part* is expected, write its "
    "name (`optimizer: lion`) or its name with options (`optimizer: {lion: {lr: 1e-4}}`)."
)


def page() -> str:
    """``runfile.md``."""
    from metier.compare.design import Design, Tune
    from metier.core.config import Data, Run, Train

    return "\n\n".join([
        "# Run files and designs", INTRO,
        "## Run", "For `metier train`, `plan` and `eval`.", _keys(Run),
        "## data", _keys(Data), "## train", "Exactly one of `steps`, `epochs` and `tokens` is needed.", _keys(Train),
        "## Design", "For `metier compare`.", _keys(Design), "## tune", _keys(Tune),
    ]) + "\n"  # fmt: skip


def _keys(model: Any) -> str:
    rows = [
        [f"`{name}`", escape(_type(field)), _default(field), docstring(field.description or "")]
        for name, field in model.model_fields.items()
    ]
    return table(["key", "type and range", "default", "meaning"], rows)


def _type(field: Any) -> str:
    from metier.core.config import PartRef, Strict

    if field.annotation in (PartRef, PartRef | None):
        return "part"
    if field.annotation == list[PartRef]:
        return "list of parts"
    inner = [a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(a, type)]
    if any(issubclass(a, Strict) for a in inner):
        return "section"
    return type_text(_with_marks(field))


def _with_marks(field: Any) -> Any:
    from typing import Annotated

    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if hasattr(value, "model_fields") else f"`{default_text(value)}`"
