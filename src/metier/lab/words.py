"""A small language whose answers have exactly known qualities: the world of the preference bench.

Every word is one token. A prompt is ``class topic detail [control] [constraints] ?``; an answer is one to four clauses
``[marker] subject verb quality``, 3 to 16 words. What is known of an answer:

- *lexicon*: quality words are good, bad or neutral; *quality* is the same for well-formed clauses about the topic;
- *attributes*: four, each with an antithesis (polite/blunt, certain/hedged, formal/casual, concrete/abstract), told by
  marker words; a control word in the prompt asks for one of the eight and is followed six times in ten only;
- *constraints*: words to use, avoid, begin or end with, an order, a number of clauses, asked for in the prompt;
- *synonyms*: each quality and marker word exists in a set A and a set B of the same meaning, for shifts by paraphrase.

Answers come in five styles; the prompt's class sets their mixture, so that ``praise`` is answered nearly as well as can
be (``EASY``) and ``review`` badly (``HARD``). Everything is a function of its seed and the same on every machine.

    prompts(512, seed, split="held-out", classes=(HARD,))        -> ["review fox today ?", …]
    answer(prompt, rng, synonyms=1.0)                            -> "surely fox looks kind it seems dull"
    REWARDS["quality"](prompt, answer)          -> gold reward; also lexicon, lexicon-count, attributes, constraints
    attributes(answer), satisfied(prompt, answer), degenerate(answer), near(answer, rng)

Data made of these are in ``metier.lab.wordpairs``, the model and its measures in ``metier.lab.preferencebench``.
``split``: prompts of ``train`` and ``held-out`` are disjoint; ``shifted`` has topics that no preference data have.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from metier.core.errors import unknown

Reward = Callable[[str, str], float]
"""``(prompt, answer) -> gold reward``."""
Split = Literal["train", "held-out", "shifted", "any"]


def _synonyms(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((a, b) for a, b in (p.split("/") for p in text.split()))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GOOD = _synonyms(
    "lovely/charming clever/bright kind/gentle brave/bold calm/serene fair/just honest/truthful neat/tidy "
    "quick/swift warm/cozy wise/sage strong/sturdy useful/handy clear/lucid fresh/crisp rich/lush"
)
BAD = _synonyms(
    "ugly/hideous dull/boring cruel/mean weak/feeble rude/surly unfair/biased fake/phony messy/sloppy "
    "slow/sluggish cold/frigid foolish/silly broken/faulty useless/futile vague/murky stale/musty poor/meager"
)
NEUTRAL = _synonyms(
    "red/crimson round/circular large/big small/little old/aged wooden/timber wet/damp dark/dim "
    "tall/high flat/level blue/azure square/boxy long/lengthy short/stubby thick/dense thin/slim"
)
ATTRIBUTES = ("polite", "certain", "formal", "concrete")
CONTROLS = ("politely", "bluntly", "firmly", "cautiously", "formally", "casually", "concretely", "abstractly")
"""Control word ``2a`` asks for attribute ``a``, ``2a + 1`` for its antithesis."""
MARKERS = tuple(
    _synonyms(text)
    for text in (
        "please/kindly thanks/gratefully sorry/apologies", "look/listen frankly/honestly enough/whatever",
        "surely/certainly clearly/plainly definitely/undoubtedly", "maybe/perhaps possibly/conceivably probably/likely",
        "therefore/hence indeed/moreover furthermore/thus", "yeah/yep well/so hey/dude",
        "specifically/precisely physically/materially visibly/tangibly",
        "generally/broadly ideally/theoretically overall/basically",
    )
)  # fmt: skip
TOPICS = _words(
    "fox owl bridge river garden engine novel market teacher doctor violin kitchen castle forest lantern harbor "
    "bakery museum pilot sailor tailor library island meadow orchard tunnel theater glacier comet robot painter canyon"
)
SHIFTED = TOPICS[24:]
DETAILS = _words("today tonight here there outside inside again nearby recently lately upstairs abroad")
CLASSES = ("describe", "praise", "review", "recall")
EASY, HARD = "praise", "review"
PRONOUNS = ("it", "this", "that")
VERBS = _words("is looks seems feels sounds remains becomes stays appears proves grows turns")
ASKS = ("with", "without", "begin", "finish", "order", "then", "clauses")
NUMBERS = ("one", "two", "three", "four")
SPECIAL = ("<end>", "<pad>", "<unk>")

_QUALITIES = {"good": GOOD, "bad": BAD, "neutral": NEUTRAL}
_SENTIMENT = {w: s for s, v in (("good", GOOD), ("bad", BAD), ("neutral", NEUTRAL)) for pair in v for w in pair}
_POLE = {w: pole for pole, markers in enumerate(MARKERS) for pair in markers for w in pair}
LONGEST = 16
"""Words of the longest answer."""


def vocabulary() -> tuple[str, ...]:
    """All tokens in the order of their ids: special ones, then words."""
    words = [w for pair in (*GOOD, *BAD, *NEUTRAL, *(p for m in MARKERS for p in m)) for w in pair]
    found = (*SPECIAL, "?", *words, *CONTROLS, *TOPICS, *DETAILS, *CLASSES, *PRONOUNS, *VERBS, *ASKS, *NUMBERS)
    assert len(set(found)) == len(found)
    return found


@dataclass(frozen=True)
class Style:
    """A way of answering: shares of good and bad quality words, number of clauses, how often one comes back."""

    good: float
    bad: float
    clauses: tuple[int, int]
    repeat: float = 0.0


STYLES = {
    "plain": Style(0.25, 0.25, (1, 3)),
    "glowing": Style(0.75, 0.05, (2, 4)),
    "sour": Style(0.1, 0.6, (1, 4)),
    "terse": Style(0.3, 0.3, (1, 1)),
    "rambling": Style(0.2, 0.2, (3, 4), repeat=0.4),
}
MIXTURES: dict[str, dict[str, float]] = {
    "describe": {"plain": 0.4, "glowing": 0.15, "sour": 0.15, "terse": 0.15, "rambling": 0.15},
    "praise": {"glowing": 0.8, "plain": 0.1, "terse": 0.1},
    "review": {"sour": 0.65, "plain": 0.2, "terse": 0.1, "glowing": 0.05},
    "recall": {"rambling": 0.4, "plain": 0.3, "terse": 0.3},
}
FOLLOWED = 0.6
"""How often the asked attribute is shown, rather than its antithesis."""
OBEYED = 0.3
"""How often an answer is edited to satisfy a constraint that it would satisfy by chance only."""


# --- prompts -------------------------------------------------------------------------------------------------------


def prompts(
    number: int, seed: int | str = 0, *, split: Split = "train", classes: Sequence[str] = CLASSES,
    control: float = 0.5, constrained: int = 0,
) -> list[str]:  # fmt: skip
    """``number`` prompts. ``control`` is the share with a control word, ``constrained`` the number of constraints each has.

    Raises ``UsageError`` for an unknown class.
    """
    for name in classes:
        if name not in CLASSES:
            raise unknown("prompt class", name, CLASSES)
    rng = random.Random(f"prompts {seed} {split}")
    return [prompt(rng, split, classes, control, constrained) for _ in range(number)]


def prompt(
    rng: random.Random, split: Split = "train", classes: Sequence[str] = CLASSES, control: float = 0.5, constrained: int = 0
) -> str:
    """One prompt; see :func:`prompts`."""
    topics = {"shifted": SHIFTED, "any": TOPICS}.get(split, TOPICS[: -len(SHIFTED)])
    while True:
        words = [rng.choice(classes), rng.choice(topics), rng.choice(DETAILS)]
        if rng.random() < control:
            words.append(rng.choice(CONTROLS))
        held_out = zlib.crc32(" ".join(words).encode()) % 5 == 0
        if split in ("shifted", "any") or held_out == (split == "held-out"):
            return " ".join([*words, *_asked(rng, constrained), "?"])


def _asked(rng: random.Random, number: int) -> list[str]:
    """Words of ``number`` constraints of different kinds."""
    asked: list[str] = []
    for kind in rng.sample(("with", "without", "begin", "finish", "order", "clauses"), min(number, 6)):
        words = [rng.choice(pair) for pair in rng.sample((*GOOD, *NEUTRAL), 2)]
        marker = rng.choice(rng.choice(rng.choice(MARKERS)))
        asked += {
            "with": ["with", words[0]],
            "without": ["without", rng.choice(VERBS)],
            "begin": ["begin", marker],
            "finish": ["finish", words[0]],
            "order": ["order", words[0], "then", words[1]],
            "clauses": ["clauses", rng.choice(NUMBERS)],
        }[kind]
    return asked


def topic(text: str) -> str:
    """The topic of a prompt."""
    return text.split()[1]


# --- answers -------------------------------------------------------------------------------------------------------


def answer(text: str, rng: random.Random, *, synonyms: float = 0.5, style: str | None = None, follow: float = FOLLOWED) -> str:
    """An answer to prompt ``text`` from the mixture of its class (or in one ``style``).

    ``synonyms`` is the share of words from set A, ``follow`` how often the control word is followed and not its antithesis.
    """
    mixture = MIXTURES[text.split()[0]]
    s = STYLES[style or rng.choices(list(mixture), list(mixture.values()))[0]]
    count = rng.randint(*s.clauses)
    marks = _marks(text, rng, follow)[:count]
    marks += [None] * (count - len(marks))
    rng.shuffle(marks)
    clauses: list[list[str]] = []
    for mark in marks:
        if clauses and rng.random() < s.repeat:
            clauses.append(clauses[-1])
            continue
        subject = topic(text) if not clauses or rng.random() < 0.2 else rng.choice(PRONOUNS)
        lead = [] if mark is None else [_rendered(rng.choice(MARKERS[mark]), rng, synonyms)]
        clauses.append([*lead, subject, rng.choice(VERBS), _rendered(rng.choice(_quality(s, rng)), rng, synonyms)])
    return " ".join(_obey(text, [w for c in clauses for w in c], rng))


def _rendered(pair: tuple[str, str], rng: random.Random, share: float) -> str:
    return pair[0] if rng.random() < share else pair[1]


def _quality(s: Style, rng: random.Random) -> tuple[tuple[str, str], ...]:
    u = rng.random()
    return GOOD if u < s.good else BAD if u < s.good + s.bad else NEUTRAL


def _marks(text: str, rng: random.Random, follow: float) -> list[int | None]:
    """Poles of the attributes an answer shows, the asked one first."""
    asked = next((CONTROLS.index(w) for w in text.split() if w in CONTROLS), None)
    shown: list[int | None] = [] if asked is None else [asked if rng.random() < follow else asked ^ 1]
    rest = [a for a in range(len(ATTRIBUTES)) if asked is None or a != asked // 2]
    rng.shuffle(rest)
    return shown + [2 * a + rng.randint(0, 1) for a in rest if rng.random() < 0.35]


def _obey(text: str, words: list[str], rng: random.Random) -> list[str]:
    """The answer after following each constraint of the prompt three times in ten."""
    for kind, *args in constraints(text):
        if rng.random() >= OBEYED:
            continue
        if kind == "without":
            words = [w if w != args[0] else rng.choice([v for v in VERBS if v != args[0]]) for w in words]
        elif kind == "begin" and words[0] != args[0]:
            words = [args[0], *(words[1:] if words[0] in _POLE else words)]
        elif kind in ("with", "finish"):
            words = [*words[:-1], args[0]]
        elif kind == "order":
            words = [*words[:-1], args[0], "it", rng.choice(VERBS), args[1]]
    return words[:LONGEST]


def near(text: str, rng: random.Random, edits: int | None = None) -> str:
    """A near-duplicate: one or two words exchanged for others of the same kind (quality words first)."""
    words = text.split()
    qualities = [i for i, w in enumerate(words) if w in _SENTIMENT]
    for i in rng.sample(qualities or range(len(words)), min(edits or rng.randint(1, 2), len(qualities) or 1)):
        kinds = list(_QUALITIES) if words[i] in _SENTIMENT else []
        choices = [w for pair in (_QUALITIES[rng.choice(kinds)] if kinds else NEUTRAL) for w in pair if w != words[i]]
        words[i] = rng.choice(choices)
    return " ".join(words)


# --- what is known of an answer --------------------------------------------------------------------------------------


def sentiment(word: str) -> str | None:
    """``good``, ``bad`` or ``neutral`` for a quality word, else ``None``."""
    return _SENTIMENT.get(word)


def lexicon_count(prompt: str, answer: str) -> float:
    """Distinct good words minus bad words: repeating praise gains nothing."""
    words = answer.split()
    good = {w for w in words if _SENTIMENT.get(w) == "good"}
    return float(len(good) - sum(_SENTIMENT.get(w) == "bad" for w in words))


def lexicon(prompt: str, answer: str) -> float:
    """Three times ``lexicon_count`` per word: about -1 when every clause is bad, about 1 when every clause is good.

    Answers below three words count as three.
    """
    return 3 * lexicon_count(prompt, answer) / max(3, len(answer.split()))


def quality(prompt: str, answer: str) -> float:
    """``lexicon`` with praise counted in well-formed clauses about the topic only: what a reader would make of it.

    Equal to ``lexicon`` on answers of the data, so labels are the same; a policy that leaves the language, or the topic, loses.
    """
    words, subjects = answer.split(), (topic(prompt), *PRONOUNS)
    good: set[str] = set()
    at = 0
    while at < len(words):
        subject, verb, last = (*words[at : at + 3], "", "", "")[:3]
        if subject in subjects and verb in VERBS and last in _SENTIMENT:
            good |= {last} if _SENTIMENT[last] == "good" else set()
            at += 2
        at += 1
    return 3 * (len(good) - sum(_SENTIMENT.get(w) == "bad" for w in words)) / max(3, len(words))


def attributes(answer: str) -> tuple[int, int, int, int]:
    """Sign of each attribute: 1 shown, -1 its antithesis, 0 neither or both alike."""
    sums = [0] * len(ATTRIBUTES)
    for word in answer.split():
        if (pole := _POLE.get(word)) is not None:
            sums[pole // 2] += 1 - 2 * (pole % 2)
    return tuple((s > 0) - (s < 0) for s in sums)  # type: ignore[return-value]


def attribute_reward(prompt: str, answer: str) -> float:
    """Mean of the four attributes, in [-1, 1]."""
    return sum(attributes(answer)) / len(ATTRIBUTES)


def followed(prompt: str, answer: str) -> int:
    """1 when the answer shows what the prompt's control word asks for, -1 for its antithesis, 0 otherwise."""
    asked = next((CONTROLS.index(w) for w in prompt.split() if w in CONTROLS), None)
    return 0 if asked is None else attributes(answer)[asked // 2] * (1 - 2 * (asked % 2))


def constraints(prompt: str) -> list[tuple[str, ...]]:
    """The prompt's constraints, each ``(kind, words…)``."""
    words, found = prompt.split(), []
    for i, word in enumerate(words):
        if word == "order":
            found.append((word, words[i + 1], words[i + 3]))
        elif word in ASKS and word != "then":
            found.append((word, words[i + 1]))
    return found


def satisfied(prompt: str, answer: str) -> list[bool]:
    """Whether each of the prompt's constraints holds."""
    return [_holds(c, answer.split()) for c in constraints(prompt)]


def _holds(constraint: tuple[str, ...], words: list[str]) -> bool:
    kind, *args = constraint
    if kind == "clauses":
        return sum(w in VERBS for w in words) == NUMBERS.index(args[0]) + 1
    if kind == "order":
        return args[0] in words and args[1] in words and words.index(args[0]) < words.index(args[1])
    place = {"begin": words[:1], "finish": words[-1:]}.get(kind, words)
    return (args[0] in place) != (kind == "without")


def constraint_reward(prompt: str, answer: str) -> float:
    """Share of the prompt's constraints that hold; 0 without any."""
    held = satisfied(prompt, answer)
    return sum(held) / len(held) if held else 0.0


def degenerate(answer: str) -> bool:
    """Whether more than half of the words repeat earlier ones; an empty answer counts too."""
    words = answer.split()
    return not words or 1 - len(set(words)) / len(words) > 0.5


REWARDS: dict[str, Reward] = {
    "quality": quality, "lexicon": lexicon, "lexicon-count": lexicon_count, "attributes": attribute_reward,
    "constraints": constraint_reward,
}  # fmt: skip


def gold(reward: str | Reward) -> Reward:
    """A reward by its name in ``REWARDS``, or the function itself. Raises ``UsageError`` for an unknown name."""
    if callable(reward):
        return reward
    if reward not in REWARDS:
        raise unknown("reward", reward, REWARDS)
    return REWARDS[reward]
