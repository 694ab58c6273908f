"""Properties of answers that can be read off their text, and the signed differences of two answers.

``CATALOGUE`` maps a name to ``(prompt, answer) -> value``. Word lists are short and English; shares are per word, so that length
is not counted twice. Other properties come with the data: keys ``NAME_chosen`` and ``NAME_rejected`` of a row.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from metier.core.data.examples import Preference
from metier.core.errors import UsageError, nearest, unknown
from metier.parts.probe._preferences import said

Property = Callable[[str, str], float]
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
LISTS = {
    "hedging": "maybe perhaps possibly probably might may could seems seem appears likely unlikely roughly around generally "
    "usually often sometimes somewhat conceivably arguably presumably believe guess suppose",
    "certainty": "surely certainly clearly plainly definitely undoubtedly always never must absolutely obviously indeed exactly",
    "politeness": "please kindly thanks thank thankful gratefully welcome sorry apologies appreciate glad pleasure",
    "formality": "therefore hence moreover furthermore thus however nevertheless consequently additionally regarding accordingly",
    "informality": "yeah yep hey dude okay ok gonna wanna kinda cool awesome lol haha guys stuff",
    "empathy": "understand feel feeling feelings tough difficult hard sorry hope care support",
    "first person": "i me my mine myself we us our i'm i've i'll i'd we're we've",
    "second person": "you your yours yourself you're you've you'll you'd",
    "good words": "good great excellent best better nice wonderful beautiful perfect love lovely helpful useful clear easy fresh "
    "happy kind clever bright brave calm fair honest neat quick warm wise strong rich charming gentle bold serene truthful tidy "
    "swift cozy sage sturdy handy lucid crisp lush",
    "bad words": "bad worse worst terrible awful poor wrong ugly hate horrible useless hard broken difficult dull cruel weak "
    "rude unfair fake messy slow cold foolish vague stale hideous boring mean feeble surly biased phony sloppy sluggish frigid "
    "silly faulty futile murky musty meager",
    "steps": "first firstly second secondly third thirdly next then finally lastly step",
}  # fmt: skip
WORDS = {name: frozenset(text.split()) for name, text in LISTS.items()}
LIMITS = re.compile(
    r"as an? (?:ai|language model)|\bi(?: am|['’]m) (?:not able|unable|not sure)|\bi (?:can(?:not|['’]t)|do(?:n['’]t| not) "
    r"(?:know|have))|\bi(?:['’]m| am) (?:sorry|afraid)",
    re.I,
)
EXAMPLES = re.compile(r"\bfor (?:example|instance)\b|\be\.g\.|\bsuch as\b|https?://|\[\d+\]|according to", re.I)
ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.M)
MARKS = re.compile(r"\*\*[^*\n]+\*\*|^#{1,6}\s|```|`[^`\n]+`|^\|.*\|\s*$", re.M)


def words(text: str) -> list[str]:
    """Words in lower case."""
    return [w.lower().replace("’", "'") for w in WORD.findall(text)]


def _share(name: str) -> Property:
    wanted = WORDS[name]

    def share(prompt: str, answer: str) -> float:
        found = words(answer)
        return sum(w in wanted for w in found) / max(1, len(found))

    return share


def _matches(pattern: str | re.Pattern[str]) -> Property:
    compiled = re.compile(pattern)
    return lambda prompt, answer: float(len(compiled.findall(answer)))


def varied(prompt: str, answer: str) -> float:
    """Minus the share of word triples that came before: what does not repeat itself has 0."""
    w = words(answer)
    triples = list(zip(w, w[1:], w[2:], strict=False))
    return len(set(triples)) / len(triples) - 1 if triples else 0.0


def relevant(prompt: str, answer: str) -> float:
    """Share of the prompt's longer words (over three letters) that come up in the answer."""
    asked = {w for w in words(prompt) if len(w) > 3}
    return len(asked & set(words(answer))) / max(1, len(asked))


def sentence_words(prompt: str, answer: str) -> float:
    """Words per sentence."""
    return len(words(answer)) / max(1, sum(bool(s.strip()) for s in re.split(r"[.!?]+", answer)))


def word_length(prompt: str, answer: str) -> float:
    """Letters per word."""
    found = words(answer)
    return sum(map(len, found)) / max(1, len(found))


def sentiment(prompt: str, answer: str) -> float:
    """Good minus bad words, per word."""
    return _share("good words")(prompt, answer) - _share("bad words")(prompt, answer)


CATALOGUE: dict[str, Property] = {
    "length": lambda prompt, answer: float(len(words(answer))),
    "non-repetitive": varied, "relevant": relevant, "long sentences": sentence_words, "long words": word_length,
    "sentiment": sentiment,
    **{name: _share(name) for name in LISTS if name not in ("good words", "bad words")},
    "admits limits": _matches(LIMITS), "supporting material": _matches(EXAMPLES), "lists": _matches(ITEM),
    "formatting": _matches(MARKS), "paragraphs": _matches(r"\n\s*\n"), "numbers": _matches(r"\d+"),
    "questions": _matches(r"\?"), "exclamations": _matches("!"), "quotations": _matches("[\"“„«]"),
}  # fmt: skip


def differences(
    pairs: Sequence[Preference], properties: Sequence[str] | None, columns: Sequence[str],
    coding: Literal["sign", "standardised"] = "sign",
) -> tuple[np.ndarray, list[str], np.ndarray]:  # fmt: skip
    """``(d [N', p], names, kept [N])``: chosen minus rejected, as signs or in standard deviations.

    ``properties`` are names of ``CATALOGUE`` (``None``: all), ``columns`` those of the rows, with a minus sign in front when more
    is worse (errors). Pairs without a value of some column are not kept. Raises ``UsageError`` for unknown names.
    """
    for name in properties or ():
        if name not in CATALOGUE:
            raise unknown("property", name, CATALOGUE, where="properties")
    own = list(CATALOGUE) if properties is None else list(properties)
    table = np.array(
        [
            [CATALOGUE[n](said(e.prompt), e.chosen) - CATALOGUE[n](said(e.prompt), e.rejected) for n in own]
            + [_given(e, c) for c in columns]
            for e in pairs
        ]
    ).reshape(len(pairs), len(own) + len(columns))
    kept: np.ndarray = np.asarray(np.isfinite(table).all(1))
    for column, values in zip(columns, table[:, len(own) :].T, strict=True):
        if not np.isfinite(values).any():
            seen = sorted({k.rpartition("_")[0] for e in pairs for k in e.meta if k.endswith("_chosen")})
            close = nearest(column.lstrip("-"), seen)
            raise UsageError(
                f"no pair has numbers {column.lstrip('-')}_chosen and {column.lstrip('-')}_rejected", where="columns",
                hint=f"Did you mean {close!r}?" if close else None,
            )  # fmt: skip
    d = table[kept]
    if coding == "sign":
        return np.sign(d), [*own, *columns], kept
    return d / np.where(d.any(0), np.sqrt((d**2).mean(0)), 1.0), [*own, *columns], kept


def _given(e: Preference, column: str) -> float:
    sign, name = (-1.0, column[1:]) if column.startswith("-") else (1.0, column)
    values = [e.meta.get(f"{name}_{side}") for side in ("chosen", "rejected")]
    if not all(isinstance(v, int | float) for v in values):
        return float("nan")
    return sign * (float(values[0]) - float(values[1]))  # type: ignore[arg-type]
