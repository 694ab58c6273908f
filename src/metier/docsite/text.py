"""Small pieces of Markdown: escaping, tables, docstrings, types, links."""

import json
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

CODE = re.compile(r"(``.+?``|`[^`\n]+`)", re.S)
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
SPECIAL = re.compile(r"([\\*_\[\]{}|])")
PART = re.compile(r"^(?:metier (?:show|check) )?([a-z]+/[a-z0-9-]+)$")
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
WORDS = {"true", "false", "null", "yes", "no", "on", "off"}
NAMES = {"str": "text", "bool": "true or false", "NoneType": "null"}


def escape(text: str) -> str:
    """Text that Markdown shows as it is; code spans in backticks stay code."""
    pieces = CODE.split(text)
    return "".join(p if i % 2 else _plain(p) for i, p in enumerate(pieces))


def _plain(text: str) -> str:
    text = SPECIAL.sub(r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?m)^(\s*\d+)\. ", r"\1\\. ", text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already, line ends become spaces."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(c).split()) for c in row) + " |" for row in lines)


def bullets(items: Sequence[str]) -> str:
    """A list; items are Markdown already."""
    return "\n".join(f"- {i}" for i in items)


def docstring(text: str) -> str:
    """A docstring as Markdown: paragraphs, code in double backticks, roles as code, ``::`` blocks."""
    text = ROLE.sub(r"`\1`", text)
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(b if b.startswith("    ") else escape(re.sub(r"::$", ":", b)) for b in blocks)


def papers(text: str) -> str:
    """A source such as ``arXiv:2302.06675, equation 7`` with its links."""
    if re.match(r"https?://\S+$", text):
        return f"<{text}>"
    return ARXIV.sub(lambda m: f"[{m.group()}](https://arxiv.org/abs/{m.group(1)})", escape(text))


def link_parts(markdown: str, known: Collection[str], up: str) -> str:
    """Code spans that name a part with a page become links to it; ``up`` leads to the root of the site."""

    def replaced(piece: str) -> str:
        m = PART.match(piece.strip("`"))
        return f"[{piece}]({up}parts/{m.group(1)}.md)" if m and m.group(1) in known else piece

    pieces = re.split(r"(?<!\[)(`[^`\n]+`)(?!\])", markdown)
    return "".join(replaced(p) if i % 2 else p for i, p in enumerate(pieces))


def type_text(annotation: Any) -> str:
    """An option's type with its range, in words: ``0 ≤ float < 1``, ``one of a, b``, ``list of int ≥ 1``."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _ranged(type_text(args[0]), args[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(f"`{a}`" for a in args)
    if origin in (list, set, frozenset):
        return f"list of {type_text(args[0])}"
    if origin is tuple:
        many = len(args) == 2 and args[1] is Ellipsis
        return f"list of {type_text(args[0])}" if many else f"[{', '.join(map(type_text, args))}]"
    if origin is dict:
        return f"mapping of {type_text(args[0])} to {type_text(args[1])}"
    name = getattr(annotation, "__name__", str(annotation))
    return NAMES.get(name, name)


def _ranged(base: str, marks: Sequence[Any]) -> str:
    bounds = {k: getattr(m, k) for m in marks for k in SIGNS if hasattr(m, k)}
    low = next((f"{v:g} {'<' if k == 'gt' else '≤'} " for k, v in bounds.items() if k in ("gt", "ge")), "")
    high = next((f" {SIGNS[k]} {v:g}" for k, v in bounds.items() if k in ("lt", "le")), "")
    if low and not high:
        key = "gt" if "gt" in bounds else "ge"
        return f"{base} {SIGNS[key]} {bounds[key]:g}"
    return f"{low}{base}{high}"


def default_text(value: Any) -> str:
    """A default as it would stand in a run file."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w/-]*", value) and value.lower() not in WORDS:
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return repr(value)


def about(option: str, doc: str) -> str:
    """The first sentence of a docstring that begins with the option's name in code; often empty."""
    flat = " ".join(doc.split())
    name = re.escape(f"``{option}``")
    for sentence in re.split(r"(?<=[.;]) (?=[A-Z`±])", flat):
        if m := re.match(rf"{name}(?:: |(?= ))(.+)", sentence):
            return (m.group(1) if f"``{option}``: " in m.group() else sentence).rstrip(".;")
    return ""
