"""Does a reward model that labels more pairs for itself make up for missing labels, and does the confidence threshold matter?

2000 pairs of the word language with Bradley-Terry labels; 120 of them (6 %) keep theirs, the others lose them (their order is
drawn by lot, the truth is kept aside). Five arms on the fine-tuned model with a new head: the 120 alone; source/ssrm with
threshold 0.8 and three rounds of labelling; all pairs, without a threshold; all 2000 with their labels; and pairs picked by lot,
with SSRM's learning rate and in each round as many as SSRM picked in that round of the same seed (``_by_lot.py``). Each takes
64 steps of 32 pairs (SSRM's rounds have 16), the first four arms with the better of two learning rates on the first seed; three
seeds. In place of early stopping each arm has the best of four checkpoints a quarter of the run apart. Checkpoint and learning
rate are chosen on 400 clean validation pairs, accuracy is given on 400 other ones (gold reward, no noise; held-out prompts).

Smaller than the card's check: the learning rate is chosen on the first of the three seeds rather than on one of its own.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core.trained import open_run
from metier.lab import wordpairs
from metier.studies._by_lot import by_lot
from metier.studies._reward_models import accuracies, at_step, standard_error
from metier.studies._self_training import MODEL, settings, written

PARTS = ("source/ssrm", "objective/bradley-terry")
CLAIM = "Iterative self-training on confident pseudo-labels comes close to a reward model trained on fully labelled data."
LRS = (3e-4, 1e-3)
HELD_OUT = ("validation", "test")
SSRM: dict[str, Any] = {"threshold": 0.8}
ARMS: dict[str, dict[str, Any] | None] = {
    "labels only": None, "all labels": None, "ssrm": SSRM, "no threshold": {**SSRM, "threshold": 0.5},
}  # fmt: skip
"""Those that are tuned."""


def run(study: Study) -> Outcome:
    """Every arm with every seed, and the card's three predictions."""
    seeds = 1 if study.quick else 3
    files = [data(study, seed) for seed in range(seeds)]
    found, chosen = {}, {}
    for arm in ARMS:
        first = {lr: trained(study, arm, files[0], lr, 0) for lr in (LRS[1:] if study.quick else LRS)}
        chosen[arm] = max(first, key=lambda lr: max(first[lr]["validation"]))
        rest = [trained(study, arm, files[seed], chosen[arm], seed) for seed in range(1, seeds)]
        found[arm] = [first[chosen[arm]], *rest]
    chosen["random"] = chosen["ssrm"]
    counts = [[round(x["selected"] * x["pool"]) for x in r["rounds"]] for r in found["ssrm"]]
    found["random"] = [trained(study, "random", files[s], chosen["ssrm"], s, counts[s]) for s in range(seeds)]
    return judged(found, chosen)


def judged(found: dict[str, list[dict[str, Any]]], chosen: dict[str, float]) -> Outcome:
    """The card's margins."""
    mean = {arm: float(np.mean([r["accuracy"] for r in runs])) for arm, runs in found.items()}
    gap = mean["all labels"] - mean["labels only"]
    closed = (mean["ssrm"] - mean["labels only"]) / gap if gap > 0 else float("nan")
    reports = [x for r in found["ssrm"] for x in r["rounds"] if x.get("selected_accuracy") is not None]
    purer = float(np.mean([x["selected_accuracy"] - x["accuracy"] for x in reports])) if reports else float("nan")
    leads = [a["accuracy"] - b["accuracy"] for a, b in zip(found["ssrm"], found["random"], strict=True)]
    lead, error = float(np.mean(leads)), standard_error(leads)
    checks = [
        Check("share of the gap between 6 % and 100 % of the labels that SSRM closes", ">= 0.4", closed, closed >= 0.4),
        Check("accuracy of the selected pseudo-labels above that of all", ">= 0.05", purer, purer >= 0.05),
        Check("threshold above random selection", "> 0", lead, lead > 0),
    ]
    notes = [f"Threshold above random selection: {lead:+.4f}, standard error {error:.4f} over {len(leads)} seeds, paired."]
    notes += [] if gap > 0.02 else [f"All labels gain only {gap:.3f} over 6 % of them: there is little to close."]
    figures = {
        "accuracy": mean,
        "lr": chosen,
        "threshold - random": {"seeds": leads, "mean": lead, "error": error},
        "runs": found,
    }
    return Outcome(checks, figures, notes)


def data(study: Study, seed: int) -> dict[str, str]:
    """Files of one seed: the labelled pairs, the others without labels, all with labels, held-out ones without noise."""
    number, few, test = (120, 24, 24) if study.quick else (2000, 120, 400)
    rows, rng = wordpairs.pairs(number, f"ssrm {seed}"), random.Random(seed)
    clean = {name: wordpairs.pairs(test, f"ssrm {name}", split="held-out", temperature=0.0) for name in HELD_OUT}
    folder = study.folder / f"data-{seed}"
    return {
        "labelled": written(folder / "labelled.jsonl", rows[:few]),
        "unlabelled": written(folder / "unlabelled.jsonl", [hidden(r, rng.random() < 0.5) for r in rows[few:]]),
        "all": written(folder / "all.jsonl", rows),
        **{name: written(folder / f"{name}.jsonl", own) for name, own in clean.items()},
    }


def hidden(row: dict[str, Any], swap: bool) -> dict[str, Any]:
    """A pair without scores, its answers perhaps exchanged; their true rewards go along."""
    w, l = ("rejected", "chosen") if swap else ("chosen", "rejected")  # noqa: E741
    return {
        "prompt": row["prompt"], "chosen": row[w], "rejected": row[l], "gold_chosen": row[f"gold_{w}"],
        "gold_rejected": row[f"gold_{l}"],
    }  # fmt: skip


def trained(
    study: Study, arm: str, files: dict[str, str], lr: float, seed: int, counts: Sequence[int] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Accuracies of one run's checkpoints and the reports of its rounds; with ``counts`` so many pairs are picked by lot."""
    steps, batch = (4, 8) if study.quick else (64, 32)
    options = ARMS[arm] if counts is None else {**SSRM, "selection": "random"}
    train: Any = files["labelled" if arm == "labels only" else "all"]
    run = settings(lr, steps, batch, seed)
    run["train"] |= {"save_every": steps // 4, "keep": 4}
    run |= {"model": MODEL, "objective": "bradley-terry", "schedule": "constant"}
    run["data"] = {"train": train, "max_length": 128}
    if options is not None:
        run["data"] |= {
            "train": {name: files[name] for name in ("labelled", "unlabelled")},
            "source": {"ssrm": {**options, "size": steps // 4 * batch}},
        }
    name = "-".join([arm.replace(" ", "-"), "saved", *map(str, counts or ()), f"{lr:g}", str(seed)])
    with by_lot(counts):
        folder = study.train(run, name).folder
    tuned, own = open_run(folder).bundle, {k: files[k] for k in HELD_OUT}
    seen = [accuracies(at_step(tuned, folder, steps // 4 * k), None, own) for k in range(1, 5)]
    told = {k: [x[k]["accuracy"] for x in seen] for k in HELD_OUT}
    best = int(np.argmax(told["validation"]))
    return {"accuracy": told["test"][best], "checkpoint": best + 1, **told, "rounds": reports(folder)}


def reports(folder: Path) -> list[dict[str, Any]]:
    """What the source says of its rounds."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted((folder / "rounds").glob("report-*.json"))]
