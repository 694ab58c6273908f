"""A small model whose answers come in four styles, three of them preferred in a circle: the world of the study condorcet-nash."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.lab import words

STYLES = (0, 2, 4, 5)
"""Poles of the marker words: polite, certain, formal, and casual, the bad one."""
P = np.array([[0.5, 0.7, 0.3, 0.95], [0.3, 0.5, 0.7, 0.95], [0.7, 0.3, 0.5, 0.95], [0.05, 0.05, 0.05, 0.5]])
POLE = {w: i for i, pole in enumerate(STYLES) for pair in words.MARKERS[pole] for w in pair}
JUDGE = {"python": {"function": f"{Path(__file__)}:prefer"}}
GAME = {"pairwise": True, "judge": JUDGE, "max_new_tokens": 24, "number": 4, "opponents": 2, "prompts": 32}
LR = 1.5e-3


def style(answer: str) -> int:
    """Style by the first word; anything else counts as the bad one."""
    return POLE.get((answer.split() or [""])[0], 3)


def prefer(prompts: Sequence[str], completions: Sequence[Sequence[str]], answers: Any) -> list[list[float]]:
    """The planted judge of two answers, as a reward part calls it."""
    return [[float(P[style(a), style(b)]), 0.0] for a, b in completions]


def shares(model: Any, prompts: Sequence[str], seed: int) -> list[float]:
    """How often each style is in four answers to each prompt."""
    from metier.lab.preferencebench import draw

    drawn = [style(a) for row in draw(model, prompts, 4, seed=seed) for a in row]
    return [drawn.count(k) / len(drawn) for k in range(4)]


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
    """The folder of a run, trained unless it is finished already."""
    folder = study.folder / name
    run = {
        "model": model, "data": {"train": data, "max_length": 32, "source": source}, "objective": objective,
        "optimizer": {"adamw": {"lr": lr, "weight_decay": 0.0}}, "schedule": {"wsd": {"decay": 0.5, "shape": "linear"}},
        "train": {"steps": 2 if study.quick else steps, "batch": 16, "seed": seed, "log_every": 50},
    }  # fmt: skip
    if not (folder / "model").is_dir():
        study.train(run, name)
    return folder
