"""The typed examples every format is converted to."""

from dataclasses import dataclass, field
from typing import Any


class BadRow(ValueError):
    """A row that cannot become an example; the message is the reason."""


@dataclass(frozen=True)
class Message:
    """One turn; ``role`` is ``system``, ``user``, ``assistant`` or ``tool``."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """What all examples have: identity (``file:row``) and the row's keys that the format does not use.

    ``meta["answer"]`` is the right answer, where one is known.
    """

    id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text(Example):
    """Plain text: every token carries loss, except those of a ``context`` put before it."""

    text: str
    context: str = ""


@dataclass(frozen=True)
class Chat(Example):
    """A conversation: the assistant's turns carry loss."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion(Example):
    """A prompt and the completion that carries loss."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Preference(Example):
    """Two different answers to a prompt; ``margin`` is the difference of their given scores, if any.

    ``samples`` are further answers, drawn from the reference model, for objectives that ask for them.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompted(Example):
    """A prompt without an answer: for sources that let the model answer."""

    prompt: Prompt


@dataclass(frozen=True)
class Judged(Example):
    """One answer, desirable (``label`` true) or not."""

    prompt: Prompt
    completion: str
    label: bool


@dataclass(frozen=True)
class Ranked(Example):
    """Two or more answers with a score each; higher is better.

    ``unfinished`` marks answers that were cut off: they have no end token, so that nothing is learnt about where to end.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    scores: tuple[float, ...]
    unfinished: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Crossed(Example):
    """C prompts, and to each the answer that was given to it: all C² combinations are scored."""

    prompts: tuple[Prompt, ...]
    completions: tuple[str, ...]


@dataclass(frozen=True)
class Labelled(Example):
    """A text, or a pair of texts, with its class: an index, or a name to be numbered over the whole data."""

    text: str
    pair: str | None
    label: int | str
