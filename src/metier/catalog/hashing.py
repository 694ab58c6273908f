"""A hash of source code that changes when behaviour may change, and only then."""

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SKIPPED = {"ctx", "kind", "type_comment", "type_ignores"}
"""Fields of a syntax tree that say nothing about behaviour."""


def code_hash(paths: Iterable[Path | str]) -> str:
    """SHA-256, in hex, over normalised sources; the order of the paths and the folders above do not matter.

    Python files count by their syntax tree without comments, layout and docstrings, written so that it is the
    same under every supported Python version; other files by their text with unified line ends.
    Raises ``FileNotFoundError`` for a missing file.
    """
    digest = hashlib.sha256()
    files = {Path(p).resolve() for p in paths}
    for name, body in sorted((f"{p.parent.name}/{p.name}", normalised(p)) for p in files):
        for text in (name, body):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def normalised(path: Path) -> str:
    """What of a file counts for ``code_hash``."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        try:
            return _canonical(ast.parse(text))
        except SyntaxError:
            pass  # an unfinished file counts by its text
    return "\n".join(text.splitlines())


def _canonical(value: Any) -> str:
    if isinstance(value, ast.AST):
        given = [(f, getattr(value, f, None)) for f in value._fields if f not in SKIPPED]
        # Absent and empty fields are left out: newer Python versions add optional ones.
        kept = [f"{f}={_canonical(v)}" for f, v in given if f == "value" or v not in (None, [])]
        return f"{type(value).__name__}({','.join(kept)})"
    if isinstance(value, list):
        return f"[{','.join(_canonical(v) for v in value if not _is_docstring(v))}]"
    return f"{type(value).__name__}:{value!r}"


def _is_docstring(node: Any) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)
