"""Is rating by aspects better than one overall score, and do diverse answers make a better reward model?

1. Gold reward: mean of the word language's four attributes, judges read them with normal noise of sd s. ``source/ultrafeedback``
   makes pairs of four noisy ratings, or of one noisy overall rating; accuracy of the labels against Φ(gap / (√2 s / √4)) and
   Φ(gap / (√2 s)), for s of half, once and twice the gap, within 3 standard errors.
2. Reward models (Bradley-Terry from the fine-tuned word model) on 1000 pairs from a pool of six (three checkpoints at two
   temperatures, four answers a prompt by members drawn without replacement) or from one model (four answers at temperature 1);
   every answer has random numbers of its own in both arms. Same 1000 prompts, the first where both arms have a better and a
   worse answer; same judge (the exact lexicon reward), steps and learning rate, three seeds; accuracy on pairs from a
   checkpoint that neither has seen.
3. Best of n by the pooled reward model of the first seed, on the plain model's answers to held-out prompts.

The checkpoints beside the first are trained for 300 steps instead of 850, which takes less time and makes them differ more.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import part
from metier.core.data.examples import Preference, Prompted
from metier.lab import preferencebench as lab
from metier.lab import words
from metier.studies._judged_pools import Members, pairs, same_prompts

PARTS = ("source/ultrafeedback", "reward/reward-model")
CLAIM = (
    "Answers of diverse models, each rated on separate aspects, give preference pairs from which a better reward model is "
    "learnt; best-of-n with it rises."
)
SEEDS, SPREADS = 3, (0.5, 1.0, 2.0)


def run(study: Study) -> Outcome:
    """All three parts."""
    seen, labels = aspects(study)
    diverse, models = diversity(study)
    curve = best_of_n(study, models["pooled"])
    rising = all(a < b for a, b in pairwise(curve[:4]))
    checks = [*seen, diverse[0], Check("3 gold reward rises from n = 1 to 8", "at each doubling", curve, rising)]
    return Outcome(checks=checks, figures={"labels": labels, "accuracy": diverse[1], "best_of_n": curve})


# --- 1 -----------------------------------------------------------------------------------------------------------------


def aspects(study: Study) -> tuple[list[Check], dict[str, Any]]:
    """Accuracy of labels from four ratings and from one."""
    number, phi = 200 if study.quick else 8000, NormalDist().cdf
    rng, found = np.random.default_rng(0), {}
    for spread in SPREADS:
        rows = rated(number, spread, rng)
        for by, judges in (("fine", 4), ("single", 1)):
            made = pairs([Prompted("p", id=str(i), meta=r[by]) for i, r in enumerate(rows)])
            right = [rows[int(e.id.split("#")[0])]["better"] == e.chosen for e in made]
            theory = phi(1 / (np.sqrt(2) * spread / np.sqrt(judges)))
            error = np.sqrt(theory * (1 - theory) / len(right))
            found[f"{by} {spread:g}"] = {"accuracy": float(np.mean(right)), "theory": theory, "error": float(error)}
    off = [(v["accuracy"] - v["theory"]) / v["error"] for v in found.values()]
    gain = 100 * (found["fine 1"]["accuracy"] - found["single 1"]["accuracy"])
    return [
        Check("1 accuracy of labels from that of theory, standard errors", "within 3", off, max(map(abs, off)) <= 3),
        Check("1 four aspects - one overall score at s = gap, points", ">= 5", gain, gain >= 5),
    ], found


def rated(number: int, spread: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of two answers with noisy ratings; the noise has ``spread`` times the sd of the gap of their gold rewards."""
    draw, out = random.Random(f"rated {spread}"), []
    while len(out) < number:
        prompt = words.prompt(draw)
        texts = [words.answer(prompt, draw) for _ in range(2)]
        told = np.array([words.attributes(t) for t in texts], float)
        gold = told.mean(1)
        gap = abs(gold[0] - gold[1])
        if gap > 0 and texts[0] != texts[1]:
            noisy = told + spread * gap * rng.standard_normal((2, 4))
            single = gold + spread * gap * rng.standard_normal(2)
            named = {f"aspect {k}": noisy[:, k].tolist() for k in range(4)}
            fine, one = ({"completions": texts, "ratings": r} for r in (named, {"overall": single.tolist()}))
            out.append({"fine": fine, "single": one, "better": texts[int(gold[1] > gold[0])]})
    return out


# --- 2 -----------------------------------------------------------------------------------------------------------------


def diversity(study: Study) -> tuple[tuple[Check, dict[str, list[float]]], dict[str, Path]]:
    """Accuracy of both kinds of reward models on answers of an unseen checkpoint, and the folders of the first seed."""
    steps = 2 if study.quick else 300
    checkpoints = [lab.sft(), lab.sft(1, steps), lab.sft(2, steps)]
    arms: dict[str, Members] = {"pooled": [(c, t) for c in checkpoints for t in (0.7, 1.3)], "single": [(checkpoints[0], 1.0)]}
    test = same_prompts(study, {"test": [(lab.sft(3, steps), 1.0)]}, "held-out", 0)["test"]
    seen: dict[str, list[float]] = {name: [] for name in arms}
    first: dict[str, Path] = {}
    for seed in range(1 if study.quick else SEEDS):
        for name, rows in same_prompts(study, arms, "train", seed).items():
            folder = trained(study, name, rows, seed)
            first.setdefault(name, folder)
            seen[name].append(accuracy(folder, test))
    gain = 100 * float(np.mean(seen["pooled"]) - np.mean(seen["single"]))
    text = "2 accuracy on an unseen checkpoint, pooled - single, points"
    return (Check(text, ">= 3", gain, gain >= 3), seen), first


def trained(study: Study, name: str, made: Sequence[Preference], seed: int) -> Path:
    """Folder of a reward model; its name depends on its pairs."""
    text = "".join(json.dumps({"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected}) + "\n" for e in made)
    full = f"{name}-{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    data = study.folder / f"{full}.jsonl"
    data.write_text(text, encoding="utf-8")
    run = {
        "model": lab.MODEL, "data": {"train": str(data), "max_length": 64}, "objective": "bradley-terry",
        "optimizer": {"adamw": {"lr": 1e-3}}, "schedule": "cosine",
        "train": {"steps": 2 if study.quick else 120, "batch": 16, "seed": seed},
    }  # fmt: skip
    study.train(run, full)
    return study.folder / full


def accuracy(folder: Path, test: Sequence[Preference]) -> float:
    """How often the reward model puts the better answer first."""
    reward = part.build("reward", {"reward-model": {"model": str(folder), "device": "cpu"}}).obj
    found = reward([str(e.prompt) for e in test], [[e.chosen, e.rejected] for e in test], None)
    return float((found[:, 0] > found[:, 1]).float().mean())


# --- 3 -----------------------------------------------------------------------------------------------------------------


def best_of_n(study: Study, folder: Path) -> list[float]:
    """Mean gold reward of the best of 1, 2, 4, 8, 16 answers by the reward model."""
    prompts = words.prompts(8 if study.quick else 256, "best of n", split="held-out")
    answers = lab.draw(lab.sft(), prompts, 16, seed=5)
    reward = part.build("reward", {"reward-model": {"model": str(folder), "device": "cpu"}}).obj
    told = reward(prompts, answers, None).numpy()
    gold = np.array([[words.lexicon(p, a) for a in row] for p, row in zip(prompts, answers, strict=True)])
    out = []
    for n in (1, 2, 4, 8, 16):
        groups = told.reshape(len(prompts), -1, n).argmax(2)
        out.append(float(np.take_along_axis(gold.reshape(len(prompts), -1, n), groups[..., None], 2).mean()))
    return out
