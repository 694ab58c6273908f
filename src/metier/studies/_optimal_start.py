"""A start that answers one class of prompts with the highest gold reward there is, and another badly."""

import random
from pathlib import Path
from typing import Any

from metier.compare.study import Study
from metier.core import models
from metier.core.models import Bundle
from metier.lab import preferencebench, words
from metier.studies._arms import size
from metier.studies._self_training import settings, written

SAMPLES = 2


def optimal(study: Study) -> tuple[Path, Bundle]:
    """The model that answers G as well as can be and B badly, and its folder."""
    rng, rows = random.Random("optimal on G"), []
    for kind in (words.EASY, words.HARD) * size(study, 2000):
        prompt = words.prompt(rng, classes=(kind,))
        rows.append({"prompt": prompt, "completion": (praise if kind == words.EASY else words.answer)(prompt, rng)})
    folder, steps = study.folder / "start", 2 if study.quick else 120
    run = {**settings(3e-3, steps, 32, 0), "model": preferencebench.MODEL, "objective": "lm", "schedule": "cosine"}
    study.train(run | {"data": {"train": written(study.folder / "start.jsonl", rows), "max_length": 128}}, "start")
    return folder / "model", models.load(str(folder / "model"))


def praise(prompt: str, rng: random.Random) -> str:
    """Two to four clauses with different good words and nothing else: gold reward 1."""
    found = [rng.choice(pair) for pair in rng.sample(words.GOOD, rng.randint(2, 4))]
    subjects = [words.topic(prompt), *(rng.choice(words.PRONOUNS) for _ in found[1:])]
    return " ".join(f"{s} {rng.choice(words.VERBS)} {w}" for s, w in zip(subjects, found, strict=True))


def with_samples(start: Bundle, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with answers of the reference."""
    drawn = preferencebench.draw(start, [r["prompt"] for r in rows], SAMPLES, seed=1)
    return [{**r, "samples": s} for r, s in zip(rows, drawn, strict=True) if all(s)]
