"""Output shared by the verbs: JSON, tables that stay clean without a terminal."""

import json
import sys
from collections.abc import Sequence
from typing import Any


def emit_json(value: Any) -> None:
    """Print JSON to standard output."""
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False, default=str)
    sys.stdout.write("\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table: rich on a terminal; aligned plain text, one record per line, otherwise."""
    if not sys.stdout.isatty():
        widths = [max(len(str(r[i])) for r in [columns, *rows]) for i in range(len(columns) - 1)]
        for row in rows:
            left = "  ".join(str(v).ljust(w) for v, w in zip(row, widths, strict=False))
            print(f"{left}  {row[-1]}".rstrip() if widths else row[-1])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    t = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for row in rows:
        t.add_row(*(str(v) for v in row))
    Console().print(t)
