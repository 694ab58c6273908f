"""Values of raw rows, checked: each function returns the typed value or raises ``BadRow`` with the reason."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from metier.core.data.examples import BadRow, Message, Prompt
from metier.core.errors import nearest

Row = Mapping[str, Any]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def need(row: Row, key: str) -> Any:
    """The value at ``key``."""
    if row.get(key) is None:
        close = nearest(key, [k for k in row if k != key])
        what = "is null" if key in row else "is missing"
        raise BadRow(f"{key!r} {what}" + (f" (there is {close!r})" if close and key not in row else ""))
    return row[key]


def kind(value: Any) -> str:
    """Name of a value's type for messages."""
    if isinstance(value, bool):
        return f"{str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    names = {
        str: "a string",
        list: "a list",
        tuple: "a list",
        dict: "an object",
        type(None): "null",
        bytes: "bytes",
    }
    return names.get(type(value), type(value).__name__)


def string(value: Any, name: str) -> str:
    """A string that is more than blanks."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind(value)}, expected a string")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    return value


def turns(value: Any, name: str) -> tuple[Message, ...]:
    """Messages from ``{role, content}`` or ``{from, value}`` turns; at most one system message, first."""
    if not isinstance(value, list | tuple):
        raise BadRow(f"{name} is {kind(value)}, expected a list of messages")
    if not value:
        raise BadRow(f"{name} is empty")
    found = tuple(_turn(turn, f"{name}[{i}]") for i, turn in enumerate(value))
    systems = [i for i, m in enumerate(found) if m.role == "system"]
    if len(systems) > 1:
        raise BadRow(f"{name} has {len(systems)} system messages, expected at most one")
    if systems and systems[0] != 0:
        raise BadRow(f"{name}[{systems[0]}] is a system message, expected only at the start")
    return found


def _turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"{name} is {kind(turn)}, expected an object with role and content")
    role_key, content_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str):
        raise BadRow(f"{name} has no {role_key!r}")
    if role.lower() not in ROLES:
        close = nearest(role, ROLES)
        raise BadRow(f"{name} has the unknown role {role!r}" + (f" (did you mean {close!r}?)" if close else ""))
    if turn.get("tool_calls"):
        raise BadRow(f"{name} has tool_calls, which are not supported: write the call into its content")
    return Message(ROLES[role.lower()], _content(turn.get(content_key), ROLES[role.lower()], f"{name} ({role})"))


def _content(value: Any, role: str, name: str) -> str:
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value):
        value = "".join(p["text"] for p in value)
    if isinstance(value, str) and role in ("system", "tool"):
        return value  # an empty system message switches a template's own off; a tool may answer nothing
    return string(value, name)


def conversation(value: Any, name: str) -> tuple[Message, ...]:
    """Messages with at least one assistant turn."""
    found = turns(value, name)
    if not any(m.role == "assistant" for m in found):
        raise BadRow(f"{name} has no assistant turn, so nothing carries loss")
    return found


def prompt(value: Any, name: str = "prompt") -> Prompt:
    """A string, or messages that do not end with the assistant."""
    if not isinstance(value, list | tuple):
        return string(value, name)
    return _open(turns(value, name), name)


def _open(messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    if messages[-1].role == "assistant":
        raise BadRow(f"{name} ends with an assistant turn, so there is nothing to answer")
    return messages


def answer(value: Any, name: str) -> str:
    """A string, or a list of exactly one assistant message."""
    if not isinstance(value, list | tuple):
        return string(value, name)
    found = turns(value, name)
    if len(found) != 1 or found[0].role != "assistant":
        raise BadRow(f"{name} has the turns {', '.join(m.role for m in found)}, expected one assistant message")
    return found[0].content


def number(value: Any, name: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} is {kind(value)}, expected a number")
    if not math.isfinite(value):
        raise BadRow(f"{name} is {value}")
    return float(value)


def flag(value: Any, name: str) -> bool:
    """True or false, also as 1/0 or a word."""
    word = str(value).lower() if isinstance(value, bool | int | str) else ""
    if word not in TRUE + FALSE:
        raise BadRow(f"{name} is {kind(value)}, expected true or false")
    return word in TRUE


def class_label(value: Any, name: str = "label") -> int | str:
    """A class index from 0, or a class name. Digits in a string are an index."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        value = int(value)
    if isinstance(value, str):
        return string(value, name).strip()
    if not isinstance(value, int):
        raise BadRow(f"{name} is {kind(value)}, expected a class index or name")
    if value < 0:
        raise BadRow(f"{name} is {value}, expected a class index from 0 (negative marks unlabelled rows)")
    return int(value)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Prompt, str, str]:
    """The common beginning of two conversations or two strings, and what follows in each."""
    if isinstance(chosen, list | tuple) and isinstance(rejected, list | tuple):
        a, b = turns(chosen, "chosen"), turns(rejected, "rejected")
        shared = _shared(a, b)
        shared -= shared == min(len(a), len(b))  # equal conversations, or one a beginning of the other
        if not shared:
            raise BadRow("chosen and rejected share no prompt")
        return (
            _open(a[:shared], "the common prompt"),
            _one(a[shared:], "chosen"),
            _one(b[shared:], "rejected"),
        )
    a, b = string(chosen, "chosen"), string(rejected, "rejected")
    cut = _cut(a[: _shared(a, b)])
    if not cut:
        raise BadRow("chosen and rejected share no prompt")
    return (
        a[:cut],
        string(a[cut:], "chosen after the common prompt"),
        string(b[cut:], "rejected after the common prompt"),
    )


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _one(messages: tuple[Message, ...], name: str) -> str:
    if len(messages) != 1 or messages[0].role != "assistant":
        raise BadRow(f"{name} has {len(messages)} messages after the common prompt, expected one assistant message")
    return messages[0].content


def _cut(shared: str) -> int:
    """Where the prompt ends: after the last mark of the assistant's turn, else before the last blank."""
    mark = "\n\nAssistant:"
    if mark in shared:
        return shared.rindex(mark) + len(mark)
    end = len(shared)
    while end and not shared[end - 1].isspace():
        end -= 1
    return len(shared[:end].rstrip())
