"""Constraints on answers that a program can verify: drawn, put into words, read back from a prompt, checked.

    found = draw(rng, 3)                                # three constraints that do not contradict each other
    prompt = compose("Describe a river.", found)        # the request, then a sentence for each
    request, again = read(prompt)                       # the same back
    checks(prompt, answer)                              # [True, False, True]
    Constraint("words", {"relation": "at least", "number": 50}).holds(answer)

The kinds are of the sort of IFEval (arXiv:2311.07911); wording and checkers are our own. A blank answer satisfies nothing, not
even bans. Letters, keywords and phrases are compared without case. Languages are told by frequent words, which is crude.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from metier.core.errors import UsageError, unknown

Arguments = Mapping[str, Any]
RELATIONS = ("at least", "at most", "exactly")
WORD = re.compile(r"\w+(?:['’-]\w+)*")


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYWORDS = _split(
    "river garden light morning friend market road winter music paper stone window bridge color water letter city forest "
    "simple early kind small clear often never always better under second people future memory order place story world"
)
BANNED = ("very", "really", "just", "actually", "basically", "good", "bad", "nice", "thing", "stuff", "maybe", "obviously")
STARTS = ("Let me begin with", "Here is what I know about", "To put it plainly", "First of all", "The short answer is")
ENDS = (
    "Is there anything else I can help with?",
    "That is all there is to it.",
    "I hope this helps.",
    "Let me know what you think.",
)
LANGUAGES = {
    "English": "the of and to is in that it with as for was this are",
    "German": "der die das und ist nicht ein eine zu mit auf den von für sich es auch",
    "French": "le la les et est un une des dans pour que qui pas sur avec du il elle",
    "Spanish": "el la los las y es un una de en que por con para no se del su",
    "Italian": "il lo gli e è un una di che non per con sono della nel si anche",
    "Portuguese": "o os as e é um uma de que não para com do da em se por mais",
    "Dutch": "de het een en is van niet dat op te met voor zijn er aan ook maar",
    "Russian": "и в не на что с это он как по из у к но за для от то",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A type of constraint."""

    name: str
    template: str
    """Its sentence, with fields from ``FIELDS``."""
    draw: Callable[[np.random.Generator], dict[str, Any]]
    check: Callable[[str, Arguments, str], bool]
    """``(answer, arguments, request) -> does it hold?``; the answer is not blank."""
    conflicts: tuple[str, ...] = ()
    """Kinds it is never combined with; the table holds in both directions."""


@dataclass(frozen=True)
class Constraint:
    """One constraint. Raises ``UsageError`` for an unknown kind, or arguments that are not those of its sentence."""

    kind: str
    arguments: Arguments = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of constraint", self.kind, KINDS)
        wanted = re.findall(r"\{(\w+)\}", KINDS[self.kind].template)
        if set(wanted) != set(self.arguments):
            raise UsageError(
                f"the constraint {self.kind} takes {', '.join(wanted) or 'no arguments'}, not {dict(self.arguments)}"
            )
        for name, value in self.arguments.items():
            if not re.fullmatch(FIELDS[name].pattern, FIELDS[name].show(value)):
                raise UsageError(f"{name} = {value!r} cannot be put into words", where=f"constraint {self.kind}")

    @property
    def text(self) -> str:
        """The sentence that asks for it."""
        return KINDS[self.kind].template.format(**{k: FIELDS[k].show(v) for k, v in self.arguments.items()})

    def holds(self, answer: str, request: str = "") -> bool:
        """Whether ``answer`` satisfies it; ``request`` is the prompt without constraints, which *repeat* needs."""
        return bool(answer.strip()) and KINDS[self.kind].check(answer, self.arguments, request)


# --- sets of constraints ------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, number: int, kinds: Sequence[str] | None = None) -> list[Constraint]:
    """``number`` constraints of different kinds, none of which conflicts with another.

    Raises ``UsageError`` for unknown kinds, or when so many do not go together.
    """
    allowed = list(kinds) if kinds else list(KINDS)
    for name in allowed:
        if name not in KINDS:
            raise unknown("kind of constraint", name, KINDS)
    for _ in range(200):
        found: list[Constraint] = []
        for i in rng.permutation(len(allowed)):
            new = Constraint(allowed[i], KINDS[allowed[i]].draw(rng))
            if len(found) < number and not any(conflicting(new, old) for old in found):
                found.append(new)
        if len(found) == number:
            return found
    raise UsageError(f"{number} of the kinds {', '.join(allowed)} do not go together")


def conflicting(a: Constraint, b: Constraint) -> bool:
    """Whether two constraints are never combined: kinds that contradict each other, or the same words wanted and banned."""
    if a.kind == b.kind or b.kind in KINDS[a.kind].conflicts or a.kind in KINDS[b.kind].conflicts:
        return True
    literal = {"include", "exclude", "frequency", "start", "end"}
    return {a.kind, b.kind} <= literal and bool(_literals(a) & _literals(b))


def _literals(c: Constraint) -> set[str]:
    """The words that a constraint names."""
    named = c.arguments.get("words") or (c.arguments.get("word", ""),)
    return {w.lower() for text in named for w in WORD.findall(text)}


def compose(request: str, constraints: Sequence[Constraint]) -> str:
    """The request with a sentence for each constraint behind it."""
    return "\n".join([request, " ".join(c.text for c in constraints)]) if constraints else request


def read(prompt: str) -> tuple[str, list[Constraint]]:
    """``(request, constraints)`` of a prompt: what our sentences in it say, in their order, and what stands before the first."""
    found = [(m.start(), name, m) for name, pattern in _patterns().items() for m in pattern.finditer(prompt)]
    found.sort(key=lambda f: f[0])
    begin = found[0][0] if found else len(prompt)
    return prompt[:begin].rstrip(), [
        Constraint(name, {k: FIELDS[k].read(v) for k, v in m.groupdict().items()}) for _, name, m in found
    ]  # fmt: skip


def checks(prompt: str, answer: str) -> list[bool]:
    """Whether each constraint that the prompt names holds."""
    request, found = read(prompt)
    return [c.holds(answer, request) for c in found]


# --- sentences ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """How an argument stands in a sentence: its pattern, and both conversions."""

    pattern: str
    read: Callable[[str], Any] = str
    show: Callable[[Any], str] = str


FIELDS = {
    "relation": Field("|".join(RELATIONS)),
    "number": Field(r"\d+", int),
    "letter": Field("[a-z]"),
    "language": Field("|".join(LANGUAGES)),
    "word": Field(r'"[^"\n]+"', lambda s: s[1:-1], '"{}"'.format),
    "words": Field(
        r'"[^"\n]+"(?:, "[^"\n]+")*', lambda s: tuple(re.findall(r'"([^"]+)"', s)), lambda v: ", ".join(f'"{w}"' for w in v)
    ),
}


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """A pattern for the sentence of each kind, with a named group for each argument."""
    out = {}
    for name, kind in KINDS.items():
        parts = re.split(r"\{(\w+)\}", kind.template)
        out[name] = re.compile("".join(
            f"(?P<{p}>{FIELDS[p].pattern})" if i % 2 else re.escape(p) for i, p in enumerate(parts)
        ))  # fmt: skip
    return out


# --- checkers -----------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words of a text; ``don't`` and ``well-known`` are one each."""
    return WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Pieces with a letter in them, cut behind ``.``, ``!`` and ``?`` before a blank, and at empty lines; not in ``P.S.``."""
    text = re.sub(r"\b(?:[^\W\d_]\.\s?){2,}", lambda m: m.group().replace(".", ""), text)
    return [s for s in re.split(r"(?<=[.!?])[\"')*]*(?:\s+|$)|\n\s*\n", text) if re.search(r"[^\W\d_]", s)]


def paragraphs(text: str) -> list[str]:
    """Blocks between empty lines."""
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]


def language(text: str) -> str | None:
    """The language whose frequent words make up most of the text, at least an eighth of it; ``None`` where none does."""
    found = [w.lower() for w in words(text)]
    frequent = {name: set(known.split()) for name, known in LANGUAGES.items()}
    shares = {name: sum(w in known for w in found) / max(1, len(found)) for name, known in frequent.items()}
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] >= 0.125 else None


def _related(value: int, a: Arguments) -> bool:
    wanted = a["number"]
    return {"at least": value >= wanted, "at most": value <= wanted, "exactly": value == wanted}[a["relation"]]


def _times(text: str, phrase: str) -> int:
    """How often a word or phrase occurs as such."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _number_of(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE | re.IGNORECASE))


def _is_json(text: str) -> bool:
    """A JSON object or list with something in it, with or without a code fence around it."""
    inner = re.sub(r"^```(?:json)?\s*\n(.*)\n```$", r"\1", text.strip(), flags=re.DOTALL | re.IGNORECASE)
    try:
        found = json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict | list) and bool(found)


def _begins(text: str, phrase: str) -> bool:
    return text.strip().lower().startswith(phrase.strip().lower())


def _two(text: str) -> bool:
    parts = [p.strip() for p in re.split(r"^\s*\*{6}\s*$", text, flags=re.MULTILINE)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 2 and text[0] == text[-1] == '"' and bool(text[1:-1].strip())


# --- draws --------------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _few(pool: Sequence[str]) -> Callable[[np.random.Generator], dict[str, Any]]:
    def some(rng: np.random.Generator) -> dict[str, Any]:
        return {"words": tuple(pool[i] for i in rng.choice(len(pool), int(rng.integers(1, 4)), replace=False))}

    return some


def _bounds(**numbers: Sequence[int]) -> Callable[[np.random.Generator], dict[str, Any]]:
    """Draws of a relation and a number of its range; names have ``_`` for blanks."""

    def some(rng: np.random.Generator) -> dict[str, Any]:
        name = _pick(rng, list(numbers))
        return {"relation": name.replace("_", " "), "number": _pick(rng, numbers[name])}

    return some


def _numbered(low: int, high: int) -> Callable[[np.random.Generator], dict[str, Any]]:
    return lambda rng: {"number": int(rng.integers(low, high + 1))}


def _frequency(rng: np.random.Generator) -> dict[str, Any]:
    return {"word": _pick(rng, KEYWORDS), **_bounds(at_least=(2, 3, 4), exactly=(1, 2, 3), at_most=(1, 2))(rng)}


def _letter(rng: np.random.Generator) -> dict[str, Any]:
    """Many of a frequent letter or few of a rare one, so that it goes together with the rest."""
    if rng.random() < 0.5:
        return {"letter": _pick(rng, "aeiorst"), "relation": "at least", "number": _pick(rng, (10, 20, 40))}
    return {"letter": _pick(rng, "jqxz"), "relation": "at most", "number": _pick(rng, (0, 1, 2))}


def _one(name: str, pool: Sequence[str]) -> Callable[[np.random.Generator], dict[str, Any]]:
    return lambda rng: {name: _pick(rng, pool)}


def _nothing(rng: np.random.Generator) -> dict[str, Any]:
    return {}


WHOLE = ("sentences", "paragraphs", "bullets", "highlights", "sections", "title", "start", "end", "quotation", "postscript",
         "two-responses", "repeat")  # fmt: skip
KINDS: dict[str, Kind] = {
    k.name: k
    for k in (
        Kind("words", "Use {relation} {number} words.", _bounds(at_least=(20, 40, 80, 120), at_most=(120, 160, 200)),
             lambda t, a, r: _related(len(words(t)), a)),
        Kind("sentences", "Write {relation} {number} sentences.", _bounds(at_least=(3, 4, 6), at_most=(8, 10), exactly=(8, 9)),
             lambda t, a, r: _related(len(sentences(t)), a)),
        Kind("paragraphs", "Write {relation} {number} paragraphs, with an empty line between them.", _bounds(exactly=(2, 3, 4)),
             lambda t, a, r: _related(len(paragraphs(t)), a)),
        Kind("include", "Include the words {words}.", _few(KEYWORDS), lambda t, a, r: all(_times(t, w) for w in a["words"])),
        Kind("exclude", "Do not use the words {words}.", _few((*BANNED, *KEYWORDS)),
             lambda t, a, r: not any(_times(t, w) for w in a["words"])),
        Kind("frequency", "Use the word {word} {relation} {number} times.", _frequency,
             lambda t, a, r: _related(_times(t, a["word"]), a)),
        Kind("letters", "Use the letter {letter} {relation} {number} times.", _letter,
             lambda t, a, r: _related(t.lower().count(a["letter"]), a)),
        Kind("uppercase", "Write everything in capital letters.", _nothing, lambda t, a, r: t.isupper(), ("lowercase",)),
        Kind("lowercase", "Write everything in small letters, without capitals.", _nothing, lambda t, a, r: t.islower()),
        Kind("no-commas", "Do not use any commas.", _nothing, lambda t, a, r: "," not in t),
        Kind("json", "Give the whole answer as valid JSON.", _nothing, lambda t, a, r: _is_json(t), WHOLE),
        Kind("bullets", 'Give {relation} {number} bullet points, each on a line that begins with "* ".',
             _bounds(exactly=(2, 3, 4, 5)),
             lambda t, a, r: _related(_number_of(r"^\s*[*-]\s+\S", t), a)),
        Kind("highlights", "Highlight at least {number} phrases with asterisks, *like this*.", _numbered(1, 3),
             lambda t, a, r: _number_of(r"\*[^\s*](?:[^\n*]*[^\s*])?\*", t) >= a["number"]),
        Kind("sections", 'Divide the answer into {relation} {number} sections, each headed by a line such as "Section 1".',
             _bounds(exactly=(2, 3, 4)), lambda t, a, r: _related(_number_of(r"^\s*section \d+\b", t), a)),
        Kind("title", "Give the answer a title in double angle brackets, such as <<title>>.", _nothing,
             lambda t, a, r: _number_of(r"<<[^<>\n]*\w[^<>\n]*>>", t) > 0),
        Kind("start", "Begin the answer with the phrase {word}.", _one("word", STARTS), lambda t, a, r: _begins(t, a["word"])),
        Kind("end", "End the answer with the exact phrase {word} and nothing behind it.", _one("word", ENDS),
             lambda t, a, r: t.strip().lower().endswith(a["word"].lower()), ("postscript",)),
        Kind("quotation", "Put the whole answer between double quotation marks.", _nothing, lambda t, a, r: _quoted(t),
             ("start", "end", "repeat", "two-responses")),
        Kind("postscript", "At the end add a postscript that begins with P.S.", _nothing,
             lambda t, a, r: _number_of(r"^\s*p\.\s?s\.\s*\W*\w", t) > 0),
        Kind("placeholders", "Leave at least {number} placeholders in square brackets, such as [name].", _numbered(1, 3),
             lambda t, a, r: _number_of(r"\[[^\[\]\n]*\w[^\[\]\n]*\]", t) >= a["number"]),
        Kind("two-responses", "Give two different answers, with a line of six asterisks (******) between them.", _nothing,
             lambda t, a, r: _two(t), ("repeat", "title", "sections", "paragraphs", "bullets", "highlights")),
        Kind("language", "Answer in {language}.", _one("language", [n for n in LANGUAGES if n != "English"]),
             lambda t, a, r: language(t) == a["language"],
             ("include", "frequency", "letters", "uppercase", "start", "end", "sections", "json")),
        Kind("repeat", "First repeat the request word for word, without these conditions, then answer it.", _nothing,
             lambda t, a, r: bool(r) and _begins(t, r) and len(t.strip()) > len(r.strip()),
             ("start", "exclude", "frequency", "letters", "no-commas", "words", "sentences", "paragraphs", "language")),
    )
}  # fmt: skip
