"""Output shared by the verbs: JSON, tables that stay clean without a terminal."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any


def emit_json(value: Any) -> None:
    """Print JSON to standard output; numbers that are not finite become null."""
    from metier.core.runfolder import finite

    json.dump(finite(value), sys.stdout, indent=1, ensure_ascii=False, default=str)
    sys.stdout.write("\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None, head: bool = False) -> None:
    """A table: rich on a terminal; aligned plain text, one record per line, otherwise, with ``head`` below the columns' names."""
    if not sys.stdout.isatty():
        widths = [max(len(str(r[i])) for r in [columns, *rows]) for i in range(len(columns) - 1)]
        for row in [columns, *rows] if head else rows:
            left = "  ".join(str(v).ljust(w) for v, w in zip(row, widths, strict=False))
            print(f"{left}  {row[-1]}".rstrip() if widths else row[-1])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    t = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for row in rows:
        t.add_row(*(str(v) for v in row))
    # rich keeps bold with NO_COLOR; without a colour system nothing but text is written.
    Console(color_system=None if os.environ.get("NO_COLOR") else "auto").print(t)


def outline(facts: dict[str, Any], indent: str = "") -> str:
    """Nested facts as indented text; empty ones are left out."""
    import textwrap

    lines: list[str] = []
    for key, value in facts.items():
        if value in (None, [], {}, "", ()):
            continue
        if isinstance(value, dict):
            lines += [f"{indent}{key}", outline(value, indent + "  ")]
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            lines += [f"{indent}{key}", *(outline(v, indent + "  ") + "\n" for v in value)]
        elif isinstance(value, list | tuple) and all(len(str(v)) < 40 for v in value):
            lines.append(f"{indent}{key}: {', '.join(map(str, value))}")
        elif isinstance(value, list | tuple):
            lines += [
                f"{indent}{key}",
                *(textwrap.fill(str(v), 100, initial_indent=f"{indent}  - ", subsequent_indent=f"{indent}    ") for v in value),
            ]
        elif "\n" in str(value):
            lines += [f"{indent}{key}", textwrap.indent(str(value), indent + "  ")]
        else:
            lines.append(textwrap.fill(f"{key}: {value}", 100, initial_indent=indent, subsequent_indent=indent + "  "))
    return "\n".join(lines)
