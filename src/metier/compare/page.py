"""What all report pages share: the template environment, tables, nested data as text."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from metier.compare import plots

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """A table for the template; columns in ``text`` are left-aligned, those in ``wrap`` break lines."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    text: Sequence[int] = (0,)
    wrap: Sequence[int] = ()


@dataclass(frozen=True)
class Chart:
    """A figure: drawing, caption, and the same numbers as a table."""

    title: str
    svg: Markup
    caption: str
    table: Table | None = None


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is None or name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write(template: str, title: str, **values: Any) -> str:
    """Render one page."""
    page = _environment().get_template(template)
    return page.render(title=title, version=_version(), clip=plots.clip_definition(), **values)


def _version() -> str:
    try:
        return version("metier")
    except PackageNotFoundError:
        return ""


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as dotted keys and text."""
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        elif value is not None:
            yield (
                name,
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str),
            )


def outline(data: Mapping[str, Any], indent: int = 0) -> str:
    """Nested data as people write it in a run file, without what is unset."""
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{'  ' * indent}{key}:", outline(value, indent + 1)]
        elif value is not None and value != {} and value != []:
            lines.append(f"{'  ' * indent}{key}: {_scalar(value)}")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False, default=str)
