"""YAML with line numbers, and ``key=value`` overrides that know about part references.

YAML 1.2 through ``ruamel.yaml``: ``1e-3`` is a number, ``no`` is a string, a duplicate key is an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metier.core.errors import UsageError

Path_ = tuple[str | int, ...]


@dataclass
class Document:
    """Plain data and the place of every key in the user's file."""

    data: dict[str, Any]
    name: str = "run"
    defaults: dict[str, Any] = field(default_factory=dict)
    """Part references that stand where the file gives none, so that an override can set one of their options."""
    lines: dict[Path_, int] = field(default_factory=dict)
    overridden: dict[Path_, str] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        """``run.yaml:5 optimizer.lion.beta1`` for a key path; the override's text for overridden keys."""
        dotted = ".".join(map(str, path)) or "the top level"
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return f"override {self.overridden[path[:end]]}"
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]} {dotted}"
        return f"{self.name} {dotted}" if self.lines else dotted


def read(path: str | Path) -> Document:
    """Read a YAML file whose top level is a mapping. Raises ``UsageError`` with the line of a syntax error."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}", hint=_siblings(path)) from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read {path}: {e}") from None
    try:
        tree = YAML().load(text)
    except MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else "?"
        problem = (e.problem or "not valid YAML").split("\n")[0]
        raise UsageError(problem, where=f"{path.name}:{line}") from None
    if not isinstance(tree, Mapping):
        raise UsageError("expected `key: value` lines at the top level", where=f"{path.name}:1")
    document = Document({}, path.name)
    document.data = _plain(tree, (), document.lines)
    return document


def _siblings(path: Path) -> str | None:
    from metier.core.errors import nearest

    names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = nearest(path.name, names)
    return f"Did you mean {path.parent / close}?" if close else None


def _plain(node: Any, path: Path_, lines: dict[Path_, int]) -> Any:
    if isinstance(node, Mapping):
        marks = getattr(node, "lc", None)
        for key in node:
            if marks is not None:
                lines[(*path, key)] = marks.key(key)[0] + 1
        return {key: _plain(value, (*path, key), lines) for key, value in node.items()}
    if isinstance(node, list):
        marks = getattr(node, "lc", None)
        for i in range(len(node)):
            if marks is not None and marks.data and i in marks.data:
                lines[(*path, i)] = marks.item(i)[0] + 1
        return [_plain(value, (*path, i), lines) for i, value in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return str(node)


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(text)
    except YAMLError:
        return text


def override(document: Document, assignments: Iterable[str]) -> Document:
    """Apply ``a.b.c=value`` in place. A part reference is transparent: with ``optimizer: {lion: {lr: 1e-4}}``
    both ``optimizer.lr=3e-4`` and ``optimizer.lion.lr=3e-4`` set the option, and ``optimizer=adamw`` replaces the part.
    """
    for text in assignments:
        key, eq, value = text.partition("=")
        if not eq or not key.strip():
            raise UsageError(f"override {text!r} is not of the form key=value")
        path = tuple(int(k) if k.isdigit() else k for k in key.strip().split("."))
        set_path(document, path, parse_value(value), text)
    return document


PART_KEYS = ("optimizer", "schedule", "adapter", "objective", "source")


def set_path(document: Document, path: Path_, value: Any, text: str) -> None:
    """Set one value, stepping through part references; records where it came from."""
    node: Any = document.data
    walked: list[str | int] = []
    for depth, key in enumerate(path[:-1]):
        node = _enter(node, key, text, document.defaults if depth == 0 else {})
        walked.append(key)
        if key in PART_KEYS and depth == 0 and isinstance(node, dict) and len(node) == 1:
            ((name, inner),) = node.items()
            if path[depth + 1] != name and not isinstance(value, type(None)):
                node[name] = inner = {} if inner is None else inner
                node, walked = inner, [*walked, name]
    if not isinstance(node, dict | list):
        raise UsageError(f"{'.'.join(map(str, walked))} is not a mapping", where=f"override {text}")
    if isinstance(node, list) and not (isinstance(path[-1], int) and path[-1] < len(node)):
        raise UsageError(f"{'.'.join(map(str, walked))} has no item {path[-1]}", where=f"override {text}")
    last: Any = path[-1]
    node[last] = value
    document.overridden[(*walked, path[-1])] = text


def _enter(node: Any, key: str | int, text: str, defaults: dict[str, Any]) -> Any:
    if isinstance(node, list):
        if isinstance(key, int) and key < len(node):
            return node[key]
        raise UsageError(f"no item {key}", where=f"override {text}")
    inner = node.get(key, defaults.get(str(key)))
    if isinstance(inner, str) and key in PART_KEYS:
        inner = {inner: {}}
    if inner is None:
        inner = {}
    if not isinstance(inner, dict | list):
        raise UsageError(f"{key} is {inner!r}, not a mapping", where=f"override {text}")
    node[key] = inner
    return inner
