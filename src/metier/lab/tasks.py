"""Tasks with known answers, made on the spot and the same on every machine.

``lab/arithmetic``: sums and differences with a verifiable answer. ``lab/markov``: text of a word chain whose entropy rate
is known, so the best possible loss is too. ``lab/bradley-terry``: preference pairs sampled from a known gold reward.
``lab/preferences`` and its relatives: preferences in the word language (``metier.lab.wordpairs``) for ``lab/words-sft``.
"""

import math
import random

ROWS = 2000
WORDS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
GOOD, BAD = ("clear", "kind", "useful", "exact"), ("vague", "rude", "useless", "wrong")


def arithmetic(rows: int = ROWS, seed: int = 0) -> list[dict]:
    """``{"question", "answer"}``; the answer ends in ``#### n`` as GSM8K's do."""
    rng = random.Random(f"arithmetic {seed}")
    out = []
    for _ in range(rows):
        a, b, plus = rng.randint(0, 99), rng.randint(0, 99), rng.random() < 0.5
        result = a + b if plus else a - b
        sign = "+" if plus else "-"
        out.append({"question": f"What is {a} {sign} {b}?", "answer": f"{a} {sign} {b} = {result}\n#### {result}"})
    return out


def transitions(seed: int = 0) -> list[list[float]]:
    """Transition matrix of the word chain: row i holds the probabilities of the next word after word i."""
    rng = random.Random(f"markov {seed}")
    weights = [[rng.random() ** 3 for _ in WORDS] for _ in WORDS]
    return [[w / sum(row) for w in row] for row in weights]


def stationary(matrix: list[list[float]], steps: int = 500) -> list[float]:
    """The chain's long-run share of every word."""
    share = [1 / len(matrix)] * len(matrix)
    for _ in range(steps):
        share = [sum(s * row[j] for s, row in zip(share, matrix, strict=True)) for j in range(len(matrix))]
    return share


def entropy_rate(seed: int = 0) -> float:
    """Nats per word that no model can go below: ``-Σ_i π_i Σ_j P_ij log P_ij``."""
    matrix = transitions(seed)
    return -sum(s * p * math.log(p) for s, row in zip(stationary(matrix), matrix, strict=True) for p in row)


def markov(rows: int = ROWS, seed: int = 0, length: int = 64) -> list[dict]:
    """``{"text"}``: words of the chain."""
    rng, matrix, out = random.Random(f"walk {seed}"), transitions(seed), []
    for _ in range(rows):
        state = rng.randrange(len(WORDS))
        walk = [state]
        for _ in range(length - 1):
            state = rng.choices(range(len(WORDS)), matrix[state])[0]
            walk.append(state)
        out.append({"text": " ".join(WORDS[s] for s in walk)})
    return out


def gold_reward(answer: str) -> float:
    """The known reward: good words minus bad words."""
    words = answer.split()
    return float(sum(w in GOOD for w in words) - sum(w in BAD for w in words))


def bradley_terry(rows: int = ROWS, seed: int = 0) -> list[dict]:
    """``{"prompt", "chosen", "rejected"}``; the first of two answers is chosen with probability ``σ(r_1 - r_2)``."""
    rng, out = random.Random(f"pairs {seed}"), []
    while len(out) < rows:
        a, b = (" ".join(rng.choices(GOOD + BAD, k=4)) for _ in range(2))
        if a == b:
            continue
        first = rng.random() < 1 / (1 + math.exp(gold_reward(b) - gold_reward(a)))
        chosen, rejected = (a, b) if first else (b, a)
        out.append({"prompt": f"Describe answer number {len(out)}.", "chosen": chosen, "rejected": rejected})
    return out


def preferences() -> list[dict]:
    """4000 clean pairs of the word language."""
    from metier.lab import wordpairs

    return wordpairs.pairs()


def preferences_flipped() -> list[dict]:
    """4000 pairs, 30 % of whose labels are flipped."""
    from metier.lab import wordpairs

    return wordpairs.pairs(flip=0.3)


def preferences_long() -> list[dict]:
    """4000 pairs judged with a bonus for length: about 70 % of the chosen answers are the longer ones."""
    from metier.lab import wordpairs

    return wordpairs.pairs(length_bonus=wordpairs.LONG_BONUS)


def preferences_held_out() -> list[dict]:
    """1000 clean pairs whose prompts are in none of the others."""
    from metier.lab import wordpairs

    return wordpairs.pairs(1000, split="held-out")


def preferences_unpaired() -> list[dict]:
    """The answers of 2000 clean pairs, each marked good or not."""
    from metier.lab import wordpairs

    return wordpairs.unpaired(wordpairs.pairs(2000))


def preference_lists() -> list[dict]:
    """1500 prompts with four scored answers each."""
    from metier.lab import wordpairs

    return wordpairs.lists()


TASKS = {
    "arithmetic": arithmetic, "markov": markov, "bradley-terry": bradley_terry, "preferences": preferences,
    "preferences-flipped": preferences_flipped, "preferences-long": preferences_long,
    "preferences-held-out": preferences_held_out, "preferences-unpaired": preferences_unpaired,
    "preference-lists": preference_lists,
}  # fmt: skip
