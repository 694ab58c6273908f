"""Does a reward model that labels more pairs for itself make up for missing labels, and does the confidence threshold matter?

2000 pairs of the word language with Bradley-Terry labels; 120 of them (6 %) keep theirs, the others lose them (their order is
drawn by lot, the truth is kept aside). Five arms on the fine-tuned model with a new head: the 120 alone; source/ssrm with
threshold 0.8 and three rounds of labelling; as many pairs picked by lot; all pairs, without a threshold; and all 2000 with
their labels. Each takes 64 steps of 32 pairs (SSRM's rounds have 16), with the better of two learning rates on the first seed,
then three seeds. Accuracy is on 400 clean held-out pairs (gold reward, no noise), the best of four evaluations a quarter of
the run apart for every arm alike, in place of early stopping.

Smaller than the card's check: the learning rate is chosen on the first of the three seeds rather than on one of its own, and
validation and test pairs are the same, which favours all arms equally.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core.config import PartRef
from metier.lab import wordpairs
from metier.studies._self_training import MODEL, settings, written

PARTS = ("source/ssrm", "objective/bradley-terry")
CLAIM = "Iterative self-training on confident pseudo-labels comes close to a reward model trained on fully labelled data."
LRS = (3e-4, 1e-3)
SSRM: dict[str, Any] = {"threshold": 0.8}
ARMS: dict[str, dict[str, Any] | None] = {
    "labels only": None, "all labels": None, "ssrm": SSRM, "random": {**SSRM, "selection": "random"},
    "no threshold": {**SSRM, "threshold": 0.5},
}  # fmt: skip


def run(study: Study) -> Outcome:
    """Every arm with every seed, and the card's three predictions."""
    seeds = 1 if study.quick else 3
    files = [data(study, seed) for seed in range(seeds)]
    found, chosen = {}, {}
    for arm in ARMS:
        first = {lr: trained(study, arm, files[0], lr, 0) for lr in (LRS[1:] if study.quick else LRS)}
        chosen[arm] = max(first, key=lambda lr: first[lr]["accuracy"])
        rest = [trained(study, arm, files[seed], chosen[arm], seed) for seed in range(1, seeds)]
        found[arm] = [first[chosen[arm]], *rest]
    return judged(found, chosen)


def judged(found: dict[str, list[dict[str, Any]]], chosen: dict[str, float]) -> Outcome:
    """The card's margins."""
    mean = {arm: float(np.mean([r["accuracy"] for r in runs])) for arm, runs in found.items()}
    gap = mean["all labels"] - mean["labels only"]
    closed = (mean["ssrm"] - mean["labels only"]) / gap if gap > 0 else float("nan")
    reports = [x for r in found["ssrm"] for x in r["rounds"] if x.get("selected_accuracy") is not None]
    purer = float(np.mean([x["selected_accuracy"] - x["accuracy"] for x in reports])) if reports else float("nan")
    lead = mean["ssrm"] - mean["random"]
    checks = [
        Check("share of the gap between 6 % and 100 % of the labels that SSRM closes", ">= 0.4", closed, closed >= 0.4),
        Check("accuracy of the selected pseudo-labels above that of all", ">= 0.05", purer, purer >= 0.05),
        Check("threshold above random selection", "> 0", lead, lead > 0),
    ]
    notes = [] if gap > 0.02 else [f"All labels gain only {gap:.3f} over 6 % of them: there is little to close."]
    return Outcome(checks, {"accuracy": mean, "lr": chosen, "runs": found}, notes)


def data(study: Study, seed: int) -> dict[str, str]:
    """Files of one seed: the labelled pairs, the others without labels, all with labels, held-out ones without noise."""
    number, few, test = (120, 24, 24) if study.quick else (2000, 120, 400)
    rows, rng = wordpairs.pairs(number, f"ssrm {seed}"), random.Random(seed)
    folder = study.folder / f"data-{seed}"
    return {
        "labelled": written(folder / "labelled.jsonl", rows[:few]),
        "unlabelled": written(folder / "unlabelled.jsonl", [hidden(r, rng.random() < 0.5) for r in rows[few:]]),
        "all": written(folder / "all.jsonl", rows),
        "test": written(folder / "test.jsonl", wordpairs.pairs(test, "ssrm test", split="held-out", temperature=0.0)),
    }


def hidden(row: dict[str, Any], swap: bool) -> dict[str, Any]:
    """A pair without scores, its answers perhaps exchanged; their true rewards go along."""
    w, l = ("rejected", "chosen") if swap else ("chosen", "rejected")  # noqa: E741
    return {
        "prompt": row["prompt"], "chosen": row[w], "rejected": row[l], "gold_chosen": row[f"gold_{w}"],
        "gold_rejected": row[f"gold_{l}"],
    }  # fmt: skip


def trained(study: Study, arm: str, files: dict[str, str], lr: float, seed: int) -> dict[str, Any]:
    """Accuracies of one run and the reports of its rounds."""
    steps, batch = (4, 8) if study.quick else (64, 32)
    options = ARMS[arm]
    train: Any = files["labelled" if arm == "labels only" else "all"]
    source: PartRef | None = None
    if options is not None:
        train = {name: files[name] for name in ("labelled", "unlabelled")}
        source = {"ssrm": {**options, "size": steps // 4 * batch}}
    run = settings(lr, steps, batch, seed)
    run["train"] |= {"eval_every": steps // 4}
    run |= {"model": MODEL, "objective": "bradley-terry", "schedule": "constant"}
    run["data"] = {"train": train, "eval": files["test"], "eval_limit": None, "max_length": 128}
    if source is not None:
        run["data"]["source"] = source
    done = study.train(run, f"{arm.replace(' ', '-')}-{lr:g}-{seed}")
    seen = [e["eval_accuracy"] for e in done.events if e["event"] == "eval"]
    return {"accuracy": max(seen), "evaluations": seen, "rounds": reports(done.folder)}


def reports(folder: Path) -> list[dict[str, Any]]:
    """What the source says of its rounds."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted((folder / "rounds").glob("report-*.json"))]
