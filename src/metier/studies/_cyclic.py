"""A small model whose answers come in four styles, three of them preferred in a circle: the world of the study condorcet-nash."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core.errors import MetierError
from metier.lab import words

STYLES = (0, 2, 4, 5)
"""Poles of the marker words: polite, certain, formal, and casual, the bad one."""
P = np.array([
    [0.5, 0.7, 0.3, 0.95, 0.95], [0.3, 0.5, 0.7, 0.95, 0.95], [0.7, 0.3, 0.5, 0.95, 0.95],
    [0.05, 0.05, 0.05, 0.5, 0.5], [0.05, 0.05, 0.05, 0.5, 0.5],
])  # fmt: skip
"""Preferences among the styles; the last row is that of an empty answer, as bad as the bad style."""
BAD, EMPTY = 3, 4
POLE = {w: i for i, pole in enumerate(STYLES) for pair in words.MARKERS[pole] for w in pair}
JUDGE = {"python": {"function": f"{Path(__file__)}:prefer"}}
GAME = {"pairwise": True, "judge": JUDGE, "max_new_tokens": 24, "number": 4, "opponents": 2, "prompts": 32}
LR = 1.5e-3


def style(answer: str) -> int:
    """Style by the first word; any other first word counts as the bad one, no word at all is ``EMPTY``."""
    return POLE.get(said[0], BAD) if (said := answer.split()) else EMPTY


def prefer(prompts: Sequence[str], completions: Sequence[Sequence[str]], answers: Any) -> list[list[float]]:
    """The planted judge of two answers, as a reward part calls it."""
    return [[float(P[style(a), style(b)]), 0.0] for a, b in completions]


def shares(model: Any, prompts: Sequence[str], seed: int) -> list[float]:
    """How often each style is in four answers to each prompt, and how often nothing is said: ``[5]``."""
    from metier.lab.preferencebench import draw

    drawn = [style(a) for row in draw(model, prompts, 4, seed=seed) for a in row]
    return [drawn.count(k) / len(drawn) for k in range(len(P))]


def answer(prompt: str, rng: random.Random) -> str:
    """One clause in a random style."""
    marker, quality = rng.choice(words.MARKERS[rng.choice(STYLES)]), rng.choice((*words.GOOD, *words.NEUTRAL))
    return " ".join([rng.choice(marker), words.topic(prompt), rng.choice(words.VERBS), rng.choice(quality)])


def labelled(prompts: Sequence[str], both: Sequence[Sequence[str]], rng: random.Random) -> list[dict[str, str]]:
    """Pairs of sampled answers with labels drawn from the planted preferences."""
    rows = []
    for prompt, (a, b) in zip(prompts, both, strict=True):
        chosen, rejected = (a, b) if rng.random() < P[style(a), style(b)] else (b, a)
        if a != b and a and b:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a file; its name."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def train(
    study: Study, name: str, model: str, data: str, objective: Any, seed: int = 0, *, source: Any = None, steps: int = 300,
    lr: float = LR,
) -> Path:  # fmt: skip
    """The folder of a run, trained unless it is finished already. Raises ``MetierError`` for one that ends before its steps."""
    folder = study.folder / name
    run = {
        "model": model, "data": {"train": data, "max_length": 32, "source": source}, "objective": objective,
        "optimizer": {"adamw": {"lr": lr, "weight_decay": 0.0}}, "schedule": {"wsd": {"decay": 0.5, "shape": "linear"}},
        "train": {"steps": 2 if study.quick else steps, "batch": 16, "seed": seed, "log_every": 50},
    }  # fmt: skip
    if not (folder / "model").is_dir() and (done := study.train(run, name).step) < run["train"]["steps"]:
        raise MetierError(f"the run {name} ended after {done} of {run['train']['steps']} steps")
    return folder


def game(rng: np.random.Generator) -> np.ndarray:
    """Random preferences among five answers."""
    p = np.triu(rng.random((5, 5)), 1)
    return p + np.tril(1 - p.T, -1) + 0.5 * np.eye(5)


def kl(a: np.ndarray, b: np.ndarray) -> float:
    """Of two policies, the first positive."""
    return float((a * np.log(a / np.maximum(b, 1e-300))).sum())


def entropy(p: np.ndarray) -> float:
    """Of shares that need not sum to 1, in units of the largest."""
    q = np.maximum(p, 1e-9) / np.maximum(p, 1e-9).sum()
    return float(-(q * np.log(q)).sum() / np.log(len(q)))
