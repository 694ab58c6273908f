"""Do few categories explain most choices, and does training on the pairs of one category move that category only?

Planted: 5000 pairs with 300 granular features, noisy copies of 12 latent categories, and choices by 12 weights; the same with
permuted choices; models with known strengths in each of three categories, rated by which one a category favours. Trained: the
word language's model (0.12 M parameters) with the mean of four attributes as gold reward; DPO on the pairs that only the second
attribute (certain) tells apart and decides, against DPO on as many random pairs; 3 seeds, 60 steps of 32 pairs, the same rate for
both, set on another seed so that the attribute moves but not to its end. Scores of the attributes are those of 2048 answers to
held-out prompts without control words, in standard deviations of the untrained model's answers. Categories come from the
attributes; no language model writes reasons.
"""

from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import preferencefit as fit
from metier.lab import wordpairs, words

PARTS = ("probe/preference-basis", "objective/dpo")
CLAIM = "Few categories keep most of the variation of preferences, and tuning on a category's pairs moves that category."
SECOND = 1


def run(study: Study) -> Outcome:
    """Planted, then trained."""
    found = [planted(study.quick), ratings(study.quick), tuned(study)]
    notes = ["The learning rate was settled in two trials on seed 9, whose outcomes were seen (0.42 sd in the own attribute)."]
    return Outcome([c for checks, _ in found for c in checks], {k: v for _, figures in found for k, v in figures.items()}, notes)


def planted(quick: bool) -> tuple[list[Check], dict[str, Any]]:
    """Latent categories behind granular features."""
    rng, pairs, each = np.random.default_rng(0), 1000 if quick else 5000, 5 if quick else 25
    z = rng.choice([-1.0, 0.0, 1.0], size=(pairs, 12), p=[0.35, 0.3, 0.35])
    noise = np.concatenate([[0.05], np.linspace(0.1, 0.5, each - 1)])
    columns = [
        np.where(rng.random(pairs) < e, rng.choice([-1.0, 0.0, 1.0], size=pairs), z[:, k]) for k in range(12) for e in noise
    ]
    m, weights = np.array(columns).T, rng.choice([-1, 1], 12) * rng.uniform(0.5, 1.2, 12)
    y, out = (rng.random(pairs) < 1 / (1 + np.exp(-z @ weights))).astype(float), rng.random(pairs) < 0.3
    basis, shuffled = fit.greedy(m, y, out), fit.greedy(m, rng.permutation(y), out)
    matched = len({k for k in range(12) for j in basis.columns if abs(np.corrcoef(m[:, j], z[:, k])[0, 1]) > 0.8})
    chance = max(abs(shuffled.full), abs((shuffled.held_out or [0.0])[-1]))
    number, share = len(basis.columns), float(basis.share or 0.0)
    return [
        Check("categories until 0.89 of what all 300 explain", "10 to 16", number, 10 <= number <= 16 and share >= 0.89),
        Check("latent categories among them, correlation > 0.8", ">= 10", matched, matched >= 10),
        Check("permuted choices: explained variation", "|.| < 0.01", chance, chance < 0.01),
    ], {"curve": basis.held_out, "all": basis.full, "coverage": basis.coverage}


def ratings(quick: bool) -> tuple[list[Check], dict[str, Any]]:
    """Strengths of five models in three categories."""
    rng, names = np.random.default_rng(1), [f"m{i}" for i in range(5)]
    truth, found = np.array([rng.permutation(5) * 120.0 for _ in range(3)]), []
    for strength in truth:
        i, j = rng.integers(5, size=(2, 400 if quick else 6000))
        i, j = i[i != j], j[i != j]
        favoured = (rng.random(len(i)) < 1 / (1 + 10 ** ((strength[j] - strength[i]) / 400))).astype(float)
        found.append(fit.elo([names[k] for k in i], [names[k] for k in j], favoured, names))
    right = sum(bool((np.argsort(a) == np.argsort(b)).all()) for a, b in zip(truth, found, strict=True))
    a, b = (1 / (1 + 10 ** (-np.subtract.outer(f, f) / 400)) for f in (found[0], found[0] + 1000))
    moved = float(np.abs(a - b).max())
    return [
        Check("Elo of three categories: planted orders found", "3", right, right == 3),
        Check("a constant added to all ratings: change of the predictions", "0", moved, moved < 1e-9),
    ], {"elo": [f.tolist() for f in found]}


# --- training --------------------------------------------------------------------------------------------------------


def tuned(study: Study) -> tuple[list[Check], dict[str, Any]]:
    """DPO on the pairs of one attribute, and on random ones."""
    from metier.lab import preferencebench as lab

    prompts = words.prompts(8 if study.quick else 256, "scored", split="held-out", control=0)
    start = scores(lab.draw(lab.sft(), prompts, 8, seed=5))
    moved: dict[str, list[list[float]]] = {"attributed": [], "random": []}
    sizes = []
    for seed in range(1 if study.quick else 3):
        rows = wordpairs.pairs(600 if study.quick else 10000, f"basis {seed}", reward="attributes")
        m = np.array([np.sign(np.subtract(words.attributes(r["chosen"]), words.attributes(r["rejected"]))) for r in rows])
        mine = fit.attributed(m, np.ones(len(m)), SECOND, alone=True)
        sizes.append(int(mine.sum()))
        others = np.random.default_rng(seed).permutation(len(rows))[: sizes[-1]]
        for name, chosen in (("attributed", np.flatnonzero(mine)), ("random", others)):
            bundle, _ = lab.train(
                {"dpo": {"beta": 0.1}}, [rows[i] for i in chosen.tolist()], lr=3e-4, steps=2 if study.quick else 60, seed=seed,
                folder=study.folder / f"{name}-{seed}", prompts=prompts[:8], samples=8, held_out=[],
            )  # fmt: skip
            change = scores(lab.draw(bundle, prompts, 8, seed=5)).mean(0) - start.mean(0)
            moved[name].append((change / np.maximum(start.std(0), 1e-9)).tolist())
    own, random = (np.mean(moved[k], axis=0) for k in ("attributed", "random"))
    rise, gap = float(own[SECOND]), float(own[SECOND] - random[SECOND])
    rest = float(np.abs(np.delete(own, SECOND)).max())
    return [
        Check("DPO on the attribute's pairs: rise of its score, in sd", ">= 0.3", rise, rise >= 0.3),
        Check("DPO on the attribute's pairs: largest change of another, in sd", "< 0.1", rest, rest < 0.1),
        Check("its rise over that by as many random pairs, in sd", "> 0", gap, gap > 0),
    ], {"pairs": sizes, "change_in_sd": moved, "attributes": list(words.ATTRIBUTES)}  # fmt: skip


def scores(answers: list[list[str]]) -> np.ndarray:
    """Attributes of all answers, ``[N, 4]``."""
    return np.array([words.attributes(a) for row in answers for a in row], float)
