"""Models that learn to follow principles from their own answers, and how well they do: the runs of the study sami."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core.models import Bundle
from metier.core.trained import open_run
from metier.lab import preferencebench, words
from metier.parts.source.sami import constitutions, under
from metier.studies import _self_training as own

PRINCIPLES = [[words.CONTROLS[2 * a], words.CONTROLS[2 * a + 1]] for a in range(4)]
TEMPLATE = "{prompt} {constitution} ?"
ARMS = {"symmetric": "symmetric", "row": "row", "column": "column", "sft": None}
RATES, TUNE, SEEDS, BATCH = (1e-4, 3e-4, 1e-3), 100, (0, 1, 2), 12


@dataclass
class Bench:
    """Runs of the study."""

    study: Study
    queries: int = 240
    samples: int = 512

    @cached_property
    def base(self) -> Bundle:
        """The model at the start."""
        return preferencebench.sft()

    def bare(self, number: int, seed: int | str, split: Any = "train") -> list[str]:
        """Prompts without a control word and without their end."""
        return [p.removesuffix(" ?") for p in words.prompts(number, seed, split=split, control=0.0)]

    def arm(self, arm: str, seed: int, lr: float) -> Path:
        """The run of one arm."""
        side, steps = ARMS[arm], self.queries // BATCH
        if side is None:
            first = self.fine_tuned(None, 0, seed, lr)
            return self.fine_tuned(first, 1, seed, lr)
        data = own.written(
            self.study.folder / f"queries-{seed}.jsonl", [{"prompt": p} for p in self.bare(2 * self.queries, seed)]
        )
        source = {
            "principles": PRINCIPLES, "size": 1, "template": TEMPLATE, "prompts": self.queries,
            "max_new_tokens": preferencebench.MAX_NEW,
        }  # fmt: skip
        return own.trained(self.study, f"{arm}-{seed}-{lr:g}", {
            "model": own.MODEL, "data": {"train": data, "max_length": 64, "source": {"sami": source}},
            "objective": {"sami": {"side": side}}, **own.settings(lr, 2 * steps, BATCH, seed),
        })  # fmt: skip

    def fine_tuned(self, start: Path | None, round: int, seed: int, lr: float) -> Path:
        """Plain likelihood of the model's own answers under constitutions, one round."""
        name, rng = f"sft-{seed}-{lr:g}-{round}", np.random.default_rng([seed, round])
        asked = [
            under(p, c, TEMPLATE, " ")
            for p in self.bare(2 * self.queries, seed)[round * self.queries : (round + 1) * self.queries]
            for c in constitutions(PRINCIPLES, 2, 1, rng)
        ]
        model = self.base if start is None else open_run(start).bundle
        drawn = preferencebench.draw(model, [str(p) for p in asked], seed=seed + round)
        rows = [{"prompt": p, "completion": a} for p, (a,) in zip(asked, drawn, strict=True) if a]
        return own.trained(self.study, name, {
            "model": own.MODEL if start is None else str(start / "model"), "objective": "lm",
            "data": {"train": own.written(self.study.folder / f"{name}.jsonl", rows), "max_length": 64},
            **own.settings(lr, self.queries // BATCH, 2 * BATCH, seed),
        })  # fmt: skip

    def asked(self, number: int) -> tuple[list[str], list[str]]:
        """Held-out queries that ask for one principle, and others that ask for two."""
        rng = random.Random("combinations")
        single = [f"{p} {rng.choice(words.CONTROLS)} ?" for p in self.bare(number, "single", "held-out")]
        pairs = [rng.sample(range(4), 2) for _ in range(number)]
        double = [
            f"{p} {' '.join(rng.choice(PRINCIPLES[a]) for a in both)} ?"
            for p, both in zip(self.bare(number, "double", "held-out"), pairs, strict=True)
        ]
        return single, double

    def figures(self, folder: Path | None) -> dict[str, float]:
        """What answers to held-out prompts show of one principle and of two."""
        model = self.base if folder is None else open_run(folder).bundle
        single, double = self.asked(self.samples // 4)
        shown, combined = (preferencebench.draw(model, prompts, 4, seed=1) for prompts in (single, double))
        accuracy, coverage = followed(single, shown)
        length = own.mean(len(a.split()) for row in shown for a in row)
        return {"accuracy": accuracy, "coverage": coverage, "combined": followed(double, combined)[0], "length": length}

    def accuracy(self, folder: Path) -> float:
        """By which a rate is chosen: one principle, on queries of the held-out split that ``figures`` has not."""
        prompts = self.choosing()
        number = max(1, self.samples // len(prompts))
        return followed(prompts, preferencebench.draw(open_run(folder).bundle, prompts, number, seed=TUNE))[0]

    def choosing(self) -> list[str]:
        """One principle for each of at most 64 queries, none of which is in ``asked``."""
        taken = {query(p) for prompts in self.asked(self.samples // 4) for p in prompts}
        rng, found = random.Random("tuning"), dict.fromkeys(self.bare(2000, "tuning", "held-out"))
        return [f"{p} {rng.choice(words.CONTROLS)} ?" for p in found if p not in taken][:64]


def query(prompt: str) -> str:
    """A prompt without its principles and its end."""
    return " ".join(w for w in prompt.split() if w not in words.CONTROLS).removesuffix(" ?")


def followed(prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Of asked attributes that answers show or contradict, the share that is shown; and how often one of both happens."""
    found = []
    for prompt, row in zip(prompts, answers, strict=True):
        asked = [words.CONTROLS.index(w) for w in prompt.split() if w in words.CONTROLS]
        found += [words.attributes(text)[a // 2] * (1 - 2 * (a % 2)) for text in row for a in asked]
    told = [f for f in found if f]
    return own.mean(f > 0 for f in told), len(told) / len(found)


def quarters(folder: Path) -> list[float]:
    """Mean bound in each quarter of a run's logged steps."""
    return [float(np.mean(part)) for part in np.array_split(own.logged(folder, "bound"), 4)]
