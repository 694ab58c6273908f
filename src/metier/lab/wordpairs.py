"""Preference data of the word language: pairs, lists, single answers, and the mixture that its model is fine-tuned on.

    mixture(8000, seed)                     -> [{"prompt", "completion"}]
    pairs(4000, seed, flip=0.3)             -> [{"prompt", "chosen", "rejected", "score_chosen", "score_rejected", …}]
    lists(1500, seed, size=4)               -> [{"prompt", "completions", "scores"}]
    unpaired(pairs(…), keep_desirable=0.1)  -> [{"prompt", "completion", "label"}]
    label(prompt, a, b, rng, …)             -> one row of ``pairs`` from two given answers

Labels are Bradley-Terry draws from a known gold reward (``metier.lab.words.REWARDS``), optionally flipped, or confounded
by length; rows say the judge's scores and the true ones. 4000 pairs take a fifth of a second. In run files:
``lab/preferences`` (4000 pairs), ``lab/preferences-flipped`` (30 % flipped), ``lab/preferences-long`` (70 % of the chosen
answers are the longer ones), ``lab/preferences-held-out`` (1000 clean pairs, other prompts), ``lab/preference-lists`` (four
answers each), ``lab/preferences-unpaired``.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from metier.lab.words import CLASSES, FOLLOWED, Reward, Split, answer, gold, near, prompt

Answerer = Callable[[str, random.Random], str]
"""``(prompt, rng) -> answer``."""
LONG_BONUS = 0.15
"""Per word, on the scale of ``quality``: makes about 70 % of the chosen answers the longer ones."""
TEMPERATURE = 0.25
"""Of the Bradley-Terry labels, on the scale of ``quality``."""


def mixture(number: int = 8000, seed: int | str = 0, *, follow: float = FOLLOWED) -> list[dict[str, str]]:
    """``{"prompt", "completion"}``: what the bench's model is fine-tuned on; a fifth of the prompts have constraints."""
    rng = random.Random(f"mixture {seed}")
    out = []
    for i in range(number):
        text = prompt(rng, "any", control=0.75, constrained=rng.randint(1, 3) if i % 5 == 0 else 0)
        out.append({"prompt": text, "completion": answer(text, rng, follow=follow)})
    return out


def label(
    prompt: str, a: str, b: str, rng: random.Random, *, reward: str | Reward = "quality", temperature: float = TEMPERATURE,
    flip: float = 0.0, length_bonus: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """A row from two answers: the one with the higher score is chosen.

    The judge's score is ``s = gold reward + length_bonus · words + temperature · Gumbel``, which makes the choice a
    Bradley-Terry draw, ``P(a) = σ((s_a - s_b)/temperature)`` of the noiseless scores. With probability ``flip`` the judge then
    mixes the two up, scores and all: ``score_chosen`` is never below ``score_rejected``. ``gold_chosen`` and ``gold_rejected``
    are the truth. At temperature 0 nothing is random, and a tie goes to ``a``.
    """
    r = gold(reward)
    golds = [r(prompt, x) for x in (a, b)]
    scores = [g + length_bonus * len(x.split()) + temperature * _gumbel(rng) for g, x in zip(golds, (a, b), strict=True)]
    high, low = (0, 1) if scores[0] >= scores[1] else (1, 0)
    flipped = rng.random() < flip
    w, l = (low, high) if flipped else (high, low)  # noqa: E741
    return {
        "prompt": prompt, "chosen": (a, b)[w], "rejected": (a, b)[l], "score_chosen": scores[high],
        "score_rejected": scores[low], "gold_chosen": golds[w], "gold_rejected": golds[l], "flipped": flipped,
    }  # fmt: skip


def _gumbel(rng: random.Random) -> float:
    return -math.log(max(rng.expovariate(1.0), 1e-300))


def pairs(
    number: int = 4000, seed: int | str = 0, *, split: Split = "train", classes: Sequence[str] = CLASSES,
    control: float = 0.5, constrained: int = 0, synonyms: float = 0.5, reward: str | Reward = "quality",
    temperature: float = TEMPERATURE, flip: float = 0.0, length_bonus: float = 0.0, near_share: float = 0.0,
    prefix_share: float = 0.0, answers: Answerer | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Preference rows, see :func:`label`.

    ``near_share`` of the pairs are near-duplicates (one or two words differ); in ``prefix_share`` of them the first 60 %
    of the words are the same. ``answers`` draws the answers instead of the data mixture. Equal answers and ties are left out.
    """
    rng, out = random.Random(f"pairs {seed} {split}"), []
    draw = answers or (lambda text, r: answer(text, r, synonyms=synonyms))
    while len(out) < number:
        text = prompt(rng, split, classes, control, constrained)
        a, b, u = draw(text, rng), draw(text, rng), rng.random()
        if u < near_share:
            b = near(a, rng)
        elif u < near_share + prefix_share:
            kept = math.ceil(0.6 * len(a.split()))
            b = " ".join([*a.split()[:kept], *b.split()[kept:]])
        if a != b and a and b:
            row = label(text, a, b, rng, reward=reward, temperature=temperature, flip=flip, length_bonus=length_bonus)
            if row["score_chosen"] > row["score_rejected"]:
                out.append(row)
    return out


def lists(
    number: int = 1500, seed: int | str = 0, *, size: int = 4, split: Split = "train", classes: Sequence[str] = CLASSES,
    control: float = 0.5, synonyms: float = 0.5, reward: str | Reward = "quality", noise: float = 0.0,
    answers: Answerer | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """``{"prompt", "completions", "scores"}``: ``size`` different answers with gold rewards plus normal noise of that sd."""
    rng, out, r = random.Random(f"lists {seed} {split}"), [], gold(reward)
    draw = answers or (lambda text, g: answer(text, g, synonyms=synonyms))
    while len(out) < number:
        text = prompt(rng, split, classes, control)
        found = list(dict.fromkeys(draw(text, rng) for _ in range(4 * size)))[:size]
        if len(found) == size and all(found):
            scores = [r(text, a) + (rng.gauss(0, noise) if noise else 0.0) for a in found]
            out.append({"prompt": text, "completions": found, "scores": scores})
    return out


def unpaired(
    rows: Iterable[dict[str, Any]], *, keep_desirable: float = 1.0, keep_undesirable: float = 1.0, seed: int = 0
) -> list[dict[str, Any]]:
    """``{"prompt", "completion", "label"}``, two of each pair, of which the given shares are kept; in random order."""
    rng, out = random.Random(f"unpaired {seed}"), []
    for row in rows:
        for key, desirable, kept in (("chosen", True, keep_desirable), ("rejected", False, keep_undesirable)):
            if rng.random() < kept:
                out.append({"prompt": row["prompt"], "completion": row[key], "label": desirable})
    rng.shuffle(out)
    return out
