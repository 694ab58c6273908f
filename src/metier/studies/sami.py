"""Does a model learn to follow principles from its own answers alone, and does it need both sides of the contrast?

The bench's word model, which follows a control word only about seven times in ten; four attributes, each with its
antithesis, are the principles, one to a constitution, C = 2. Two rounds of 240 queries in steps of 12, each round's answers by
the model at its beginning. Arms: symmetric, row only, column only, and SFT on as many own answers under the same kind of prompts,
renewed for its second round too. The learning rate of each is chosen among three by accuracy with one seed; three other seeds
are then run. Accuracy: of held-out answers that show the asked attribute or its antithesis, the share that shows the asked
one. The held-out combination: two principles at once, which neither the model's data nor the training have. The bound
log C - loss is averaged over quarters of the run, after which it is stopped.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core.models import Bundle
from metier.core.trained import open_run
from metier.lab import preferencebench, words
from metier.parts.source.sami import constitutions, under
from metier.studies import _self_training as own

PARTS = ("source/sami", "objective/sami")
CLAIM = "Contrasting own answers with the principles they were written under teaches a model to follow these, without labels."
PRINCIPLES = [[words.CONTROLS[2 * a], words.CONTROLS[2 * a + 1]] for a in range(4)]
TEMPLATE = "{prompt} {constitution} ?"
ARMS = {"symmetric": "symmetric", "row": "row", "column": "column", "sft": None}
RATES, TUNE, SEEDS, BATCH = (1e-4, 3e-4, 1e-3), 100, (0, 1, 2), 12


def run(study: Study) -> Outcome:
    """Tune, run, compare."""
    bench = Bench(study, 24, samples=64) if study.quick else Bench(study)
    seeds, rates, choices = SEEDS[:1] if study.quick else SEEDS, dict.fromkeys(ARMS, RATES[1]), {}
    for arm in () if study.quick else ARMS:
        rates[arm], choices[arm] = own.best_of(RATES, lambda lr, a=arm: bench.figures(bench.arm(a, TUNE, lr))["accuracy"])
    folders = {arm: [bench.arm(arm, s, rates[arm]) for s in seeds] for arm in ARMS}
    rows = {arm: [bench.figures(f) for f in found] for arm, found in folders.items()}
    table = {k: {arm: own.mean(f[k] for f in found) for arm, found in rows.items()} for k in rows["row"][0]}
    base = bench.figures(None)
    bound = np.mean([quarters(f) for f in folders["symmetric"]], axis=0).tolist()
    by_seed = {arm: [f["accuracy"] for f in found] for arm, found in rows.items()}
    return Outcome(checks(table, base, bound), {**table, "base": base, "bound": bound, "sweeps": choices, "by_seed": by_seed})


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

    def figures(self, folder: Path | None) -> dict[str, float]:
        """What answers to held-out prompts show of one principle and of two."""
        model = self.base if folder is None else open_run(folder).bundle
        rng, number = random.Random("combinations"), self.samples // 4
        single = [f"{p} {rng.choice(words.CONTROLS)} ?" for p in self.bare(number, "single", "held-out")]
        pairs = [rng.sample(range(4), 2) for _ in range(number)]
        double = [
            f"{p} {' '.join(rng.choice(PRINCIPLES[a]) for a in both)} ?"
            for p, both in zip(self.bare(number, "double", "held-out"), pairs, strict=True)
        ]
        shown, combined = (preferencebench.draw(model, prompts, 4, seed=1) for prompts in (single, double))
        accuracy, coverage = followed(single, shown)
        length = own.mean(len(a.split()) for row in shown for a in row)
        return {"accuracy": accuracy, "coverage": coverage, "combined": followed(double, combined)[0], "length": length}


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


def checks(table: Mapping[str, Mapping[str, float]], base: Mapping[str, float], bound: Sequence[float]) -> list[Check]:
    """The card's predictions with its margins."""
    accuracy, best = table["accuracy"], table["accuracy"]["symmetric"]
    more, combined = accuracy["sft"] - base["accuracy"], table["combined"]["symmetric"] - base["combined"]
    drift = {arm: abs(length - base["length"]) for arm, length in table["length"].items()}
    sides = [
        Check(f"{side} only: accuracy, length drift", f"below {best:.3g}, or drift above {drift['symmetric']:.3g}",
              [accuracy[side], drift[side]], accuracy[side] < best or drift[side] > drift["symmetric"])
        for side in ("row", "column")
    ]  # fmt: skip
    return [
        Check("accuracy of SAMI", ">= 0.75", best, best >= 0.75),
        Check("accuracy of SFT on own samples over the base's", "<= 0.05", more, more <= 0.05),
        Check("accuracy with two principles over the base's", ">= 0.05", combined, combined >= 0.05),
        *sides,
        Check("bound in quarters of the run", "rises", list(bound), bool(np.all(np.diff(bound) > 0))),
    ]
