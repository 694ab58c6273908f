"""Twenty preference objectives under four stressors: do the variants remedy what their tags say?

The bench's fine-tuned model, 64 steps of 32 pairs at learning rate 1e-3, two seeds, every objective with its own defaults, which
are not tuned to each other: what is compared is how an objective changes from one kind of data to another, or a behaviour that
its form fixes. Kinds of data, 4000 pairs each: clean; 30 % of the labels flipped; a bonus for length in the labels, so that 70 %
of the chosen answers are the longer ones; answers in other words than the model's own (synonyms of the second set). Objectives
for single answers read the pairs as such. Gold reward and length of 128 sampled answers, implicit rewards on 200 clean held-out
pairs.

Predictions, from the tags alone and against DPO: those for noise lose less gold reward to flipped labels; those for length grow
less on confounded labels; those for the likelihood of good answers keep the chosen answers' log-probability higher on clean ones.
Each is about the mean over the objectives with that tag. Tiny models and defaults: this is about mechanisms and is no ranking.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import taxonomy
from metier.lab import preferencebench, wordpairs, words

NAMES = ("dpo", "ipo", "hinge", "exo", "sppo", "cdpo", "robust-dpo", "dr-dpo", "dpop", "rpo", "cal-dpo", "apo-zero", "nca",
         "r-dpo", "ln-dpo", "simpo", "orpo", "cpo", "kto", "bco")  # fmt: skip
PARTS = tuple(f"objective/{n}" for n in NAMES)
CLAIM = "Each variant of DPO changes one piece of the loss, for one fault of data or behaviour."
STRESSORS: dict[str, dict[str, Any]] = {
    "clean": {}, "flipped": {"flip": 0.3}, "long": {"length_bonus": wordpairs.LONG_BONUS}, "other words": {"synonyms": 1.0},
}  # fmt: skip
KEPT = ("gold_reward", "gold_sd", "length", "kl", "gold_accuracy", "chosen_change", "rejected_change")
Table = Mapping[tuple[str, str], dict[str, float]]


def run(study: Study) -> Outcome:
    """All objectives on all data."""
    table = {(n, s): _mean(study, n, s) for n in (("dpo", "cdpo", "ln-dpo", "rpo") if study.quick else NAMES) for s in STRESSORS}
    names = list(dict.fromkeys(n for n, _ in table))
    rows = {n: {s: table[n, s] for s in STRESSORS} for n in names}
    shown = ["objective: gold reward on " + ", ".join(STRESSORS)]
    shown += [f"{n}: " + ", ".join(f"{table[n, s]['gold_reward']:.2f}" for s in STRESSORS) for n in names]
    shown.append("Mechanisms on a tiny model with default options: no ranking.")
    if not study.quiet:
        print("\n".join(shown))
    return Outcome(judged(table, names), {"table": rows}, shown)


def judged(table: Table, names: list[str]) -> list[Check]:
    """The three predictions."""
    record = {n: taxonomy.traits(n) for n in names}
    lost = {n: table[n, "clean"]["gold_reward"] - table[n, "flipped"]["gold_reward"] for n in names}
    grown = {n: table[n, "long"]["length"] - table[n, "clean"]["length"] for n in names}
    kept = {n: -table[n, "clean"]["chosen_change"] for n in names}
    found = []
    for tag, what, values in (
        ("data/quality/noise", "gold reward lost to flipped labels", lost),
        ("model/generation/length", "tokens added by confounded labels", grown),
        ("model/optimisation/likelihood", "fall of the chosen answers' log-probability", kept),
    ):
        tagged = [n for n in names if tag in record[n].declared]
        mean = float(np.mean([values[n] for n in tagged]))
        text = f"{what}, {', '.join(tagged)} less dpo"
        found.append(Check(text, "< 0", mean - values["dpo"], mean < values["dpo"]))
    return found


def _mean(study: Study, name: str, stressor: str) -> dict[str, float]:
    runs = [_figures(study, name, stressor, seed) for seed in ((0,) if study.quick else (0, 1))]
    return {k: float(np.mean([r[k] for r in runs])) for k in KEPT}


def _figures(study: Study, name: str, stressor: str, seed: int) -> dict[str, float]:
    size: dict[str, Any] = {"steps": 2, "samples": 8} if study.quick else {"steps": 64, "samples": 128}
    rows = wordpairs.pairs(64 if study.quick else 4000, f"survey {stressor}", **STRESSORS[stressor])
    return preferencebench.train(
        name, rows, lr=1e-3, seed=seed, folder=study.folder / f"{name}-{stressor.replace(' ', '-')}-{seed}",
        prompts=words.prompts(64, "survey", split="held-out"), held_out=wordpairs.pairs(200, "survey", split="held-out"), **size,
    )[1]  # fmt: skip
