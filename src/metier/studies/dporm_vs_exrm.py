"""Does the reward that DPO implies rank pairs worse than a reward head trained on the same pairs, once the data shift?

2000 pairs of the word language whose quality and marker words all come from synonym set A (the model has been fine-tuned on
both sets); Bradley-Terry labels from the gold reward. A reward head (EXRM) and DPO (beta 0.1, its reward DPORM) are trained
from the fine-tuned model for 125 steps of 32 pairs, three seeds, each with the best of three learning rates by accuracy on 400
clean validation pairs of the training's kind. Accuracy on the training pairs and on clean pairs: held-out ones, new topics,
other styles (terse and rambling answers, as of another generator), and synonym set B. DPORM is given summed and per token. Then
one more round: the DPO model answers held-in prompts twice, EXRM or DPORM labels, DPO goes on from that model with it as the
reference; gold reward of 512 answers, of the model before the round too, with standard errors. Exact statements (ties at the
start, terms of the prompt) are in the tests of probe/reward-accuracy.

The card compares at equal accuracy in distribution. Here learning rates are tuned in place of early stopping, and accuracies in
distribution are not forced to be equal; so beside the card's check of the gap over the shifts there is one, with the card's
margin, of that gap less the gap in distribution: without it a reward that is merely better everywhere would pass. Smaller than
the card's check: learning rates are tuned on the first seed, and each shift has 400 pairs.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import models
from metier.core.models import Bundle
from metier.core.trained import open_run
from metier.lab import preferencebench, wordpairs, words
from metier.studies._gold_rounds import rounds, told
from metier.studies._reward_models import accuracies, rewards
from metier.studies._self_training import MODEL, settings, written

PARTS = ("objective/bradley-terry", "objective/dpo", "probe/reward-accuracy")
CLAIM = "DPO's implicit reward fits the training pairs as well as an explicit head but ranks worse out of distribution."
LRS = {"exrm": (3e-4, 1e-3, 3e-3), "dporm": (3e-4, 1e-3, 3e-3)}
SHIFTS = ("topics", "styles", "set B")
STYLES = ("terse", "rambling")


def run(study: Study) -> Outcome:
    """Both rewards on every seed, the shifts, and the further round."""
    base, runs, chosen = models.load(MODEL), [], {}
    for seed in range(1 if study.quick else 3):
        files = data(study, seed)
        if not chosen:
            chosen = {arm: tuned(study, arm, files, base) for arm in LRS}
        bundles = {arm: trained(study, arm, files["train"], chosen[arm], seed) for arm in LRS}
        found = {arm: accuracies(b, base if arm == "dporm" else None, files) for arm, b in bundles.items()}
        gold = {arm: next_round(study, arm, bundles, base, chosen["dporm"], seed) for arm in LRS}
        gold["start"] = told(study, bundles["dporm"])
        runs.append({**table(found), "gold": gold})
    return judged(runs, chosen)


def table(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracies of EXRM, DPORM and DPORM per token on every set."""
    out = {arm: {name: row["accuracy"] for name, row in rows.items()} for arm, rows in found.items()}
    return {**out, "per token": {name: row["per_token"]["accuracy"] for name, row in found["dporm"].items()}}


def judged(runs: Sequence[dict[str, Any]], chosen: dict[str, float]) -> Outcome:
    """The card's margins."""
    mean = {
        arm: {name: float(np.mean([r[arm][name] for r in runs])) for name in runs[0][arm]}
        for arm in ("exrm", "dporm", "per token")
    }  # fmt: skip
    fit = abs(mean["exrm"]["train"] - mean["dporm"]["train"])
    gaps = {name: mean["exrm"][name] - mean["dporm"][name] for name in SHIFTS}
    own = mean["exrm"]["held-out"] - mean["dporm"]["held-out"]
    average = float(np.mean(list(gaps.values())))
    worst = max(gaps, key=gaps.__getitem__)
    gold, leads = rounds(runs)
    checks = [
        Check("difference of accuracy on the training pairs", "<= 0.02", fit, fit <= 0.02),
        Check("EXRM above DPORM, mean over the shifts", ">= 0.03", average, average >= 0.03),
        Check("the same less EXRM above DPORM in distribution", ">= 0.03", average - own, average - own >= 0.03),
        Check("shift with the largest gap", "set B", worst, worst == "set B"),
        Check(
            "gold reward after a round labelled by EXRM, above one labelled by DPORM", ">= 0", leads["mean"], leads["mean"] >= 0
        ),
    ]
    normalised = float(np.mean([mean["exrm"][name] - mean["per token"][name] for name in SHIFTS]))
    notes = [
        f"In distribution EXRM is {own:+.3f} above DPORM; over the shifts {normalised:+.3f} above DPORM per token.",
        f"The round: gold reward {gold['start']:.3f} before, {gold['exrm']:.3f} after labels of EXRM, {gold['dporm']:.3f} after "
        f"labels of DPORM; difference {leads['mean']:+.3f}, standard error {leads['error']:.3f} over {len(runs)} seeds, paired.",
    ]
    if not abs(leads["mean"]) > 2 * leads["error"]:
        notes.append("The difference after the round is within two standard errors: its check says nothing either way.")
    edge = [arm for arm, lr in chosen.items() if lr in (min(LRS[arm]), max(LRS[arm]))]
    notes += [f"The best learning rate is at an end of the sweep for {', '.join(edge)}."] if edge else []
    figures = {"accuracy": mean, "gaps": gaps, "gold_reward": gold, "exrm - dporm after the round": leads, "lr": chosen}
    return Outcome(checks, {**figures, "runs": list(runs)}, notes)


def data(study: Study, seed: int) -> dict[str, str]:
    """Files: training pairs, and clean ones of the same kind and of every shift."""
    train, test = (32, 16) if study.quick else (2000, 400)

    def other(text: str, rng: random.Random) -> str:
        return words.answer(text, rng, synonyms=1.0, style=rng.choice(STYLES))

    clean: dict[str, Any] = {"number": test, "seed": "dporm", "temperature": 0.0}
    rows = {
        "train": wordpairs.pairs(train, f"dporm {seed}", synonyms=1.0),
        "held-out": wordpairs.pairs(**clean, split="held-out", synonyms=1.0),
        "validation": wordpairs.pairs(**{**clean, "seed": "dporm validation"}, split="held-out", synonyms=1.0),
        "topics": wordpairs.pairs(**clean, split="shifted", synonyms=1.0),
        "styles": wordpairs.pairs(**clean, split="held-out", answers=other),
        "set B": wordpairs.pairs(**clean, split="held-out", synonyms=0.0),
    }
    return {name: written(study.folder / f"data-{seed}" / f"{name.replace(' ', '-')}.jsonl", r) for name, r in rows.items()}


def trained(study: Study, arm: str, train: str, lr: float, seed: int, model: str = MODEL, name: str = "") -> Bundle:
    """The tuned model of one run."""
    steps, batch = (2, 8) if study.quick else (60 if name else 125, 32)
    run = {**settings(lr, steps, batch, seed), "model": model, "schedule": "cosine"}
    run |= {"objective": "bradley-terry" if arm == "exrm" else "dpo", "data": {"train": train, "max_length": 128}}
    return open_run(study.train(run, name or f"{arm}-{lr:g}-{seed}").folder).bundle


def tuned(study: Study, arm: str, files: dict[str, str], base: Bundle) -> float:
    """The learning rate of the best accuracy on the validation pairs, on the first seed."""
    lrs = LRS[arm][1:2] if study.quick else LRS[arm]
    own = {"validation": files["validation"]}

    def score(lr: float) -> float:
        bundle = trained(study, arm, files["train"], lr, 0)
        return accuracies(bundle, base if arm == "dporm" else None, own)["validation"]["accuracy"]

    return max(lrs, key=score)


def next_round(study: Study, arm: str, bundles: dict[str, Bundle], base: Bundle, lr: float, seed: int) -> dict[str, float]:
    """Gold reward, with its standard error, after DPO went on with its own answers, labelled by the reward of ``arm``."""
    policy = bundles["dporm"]
    prompts = words.prompts(16 if study.quick else 960, f"dporm round {seed}")
    answers = [a if a[0] != a[1] and all(a) else None for a in preferencebench.draw(policy, prompts, 2, seed=seed)]
    asked, kept = [p for p, a in zip(prompts, answers, strict=True) if a], [a for a in answers if a]
    found = rewards(bundles[arm], base if arm == "dporm" else None, asked, kept)
    rows = [
        {"prompt": p, "chosen": a[int(np.argmax(r))], "rejected": a[int(np.argmin(r))]}
        for p, a, r in zip(asked, kept, found, strict=True) if r[0] != r[1]
    ]  # fmt: skip
    name = f"round-{arm}-{lr:g}-{seed}"
    file = written(study.folder / f"{name}.jsonl", rows)
    start = str(study.folder / f"dporm-{lr:g}-{seed}" / "model")
    return told(study, trained(study, "dporm", file, lr, seed, start, name))
