"""Does a sparse regression on property differences show what a judge rewards, well enough to exploit it?

Planted: 8 of 29 weights are not 0, 4000 pairs with signs as differences. (1) Two reward models of the word language (0.12 M
parameters, 200 steps of 32 pairs, one learning rate) are trained on the same gold reward, the good less the bad words; in the
data of one, length adds to it, so that 70 % of its chosen answers are the longer ones. Both judge the same 1000 held-out pairs,
in both orders, and are dissected by the probe with the columns length, good words, bad words, repetition and the four attributes.
(2) The fine-tuned model answers 128 held-out prompts eight times; the answers are ranked by each reward model's weights, and by
their negatives. (3) SmolLM2-135M-Instruct, where it is installed, is asked for the better of two answers by the probabilities of
A and B, in both orders, on 200 pairs with constraints in the prompt; its weights are reported only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import part, preferencefit
from metier.core.errors import MetierError
from metier.lab import wordpairs, words

PARTS = ("probe/preference-properties", "reward/reward-model", "objective/bradley-terry")
CLAIM = "Few properties explain a judge's choices; what their weights favour raises its scores, and the opposite lowers them."
COLUMNS = ("length", "good", "bad", "repetition", *words.ATTRIBUTES)
BIAS = {"plain": 0.0, "long": wordpairs.LONG_BONUS}


def run(study: Study) -> Outcome:
    """Planted, audit, manipulation, a language model."""
    models = {name: trained(study, name) for name in BIAS}
    audited = audit(study, models)
    found = [planted(), audited, manipulation(study, models, audited[1]["audit"])]
    weights, notes = letters(study)
    figures = {k: v for _, f in found for k, v in f.items()} | {"smollm2": weights}
    return Outcome([c for checks, _ in found for c in checks], figures, notes)


def planted() -> tuple[list[Check], dict[str, Any]]:
    """Weights that are known."""
    rng = np.random.default_rng(0)
    d, truth = rng.choice([-1.0, 0.0, 1.0], size=(4000, 29)), np.zeros(29)
    truth[:8] = rng.choice([-1, 1], 8) * rng.uniform(0.3, 1.0, 8)
    y = (rng.random(4000) < 1 / (1 + np.exp(-d @ truth))).astype(float)
    posterior = preferencefit.posterior_mean(d, y)
    fits = {"mode": preferencefit.l1_logistic(d, y), "mean": posterior.mean}
    r = min(float(np.corrcoef(a, truth)[0, 1]) for a in fits.values())
    signs = all(bool((np.sign(a[:8]) == np.sign(truth[:8])).all()) for a in fits.values())
    null = max(float(np.abs(a[8:]).max()) for a in fits.values())
    turned = float(np.abs(preferencefit.l1_logistic(-d, 1 - y) - fits["mode"]).max())
    return [
        Check("planted weights: correlation with the recovered ones", ">= 0.95", r, r >= 0.95),
        Check("planted weights: signs of the eight", "all right", signs, signs),
        Check("planted weights: largest of the 21 others", "< 0.1", null, null < 0.1),
        Check("all pairs turned round: change of the weights", "0", turned, turned < 1e-8),
    ], {"planted": {"truth": truth.tolist(), **{k: v.tolist() for k, v in fits.items()}, "rhat": posterior.rhat}}


# --- reward models ---------------------------------------------------------------------------------------------------


def values(prompt: str, answer: str) -> dict[str, float]:
    """What is known of an answer, by column."""
    found, kinds = answer.split(), [words.sentiment(w) for w in answer.split()]
    known = (len(found), kinds.count("good"), kinds.count("bad"), len(found) - len(set(found)), *words.attributes(answer))
    return dict(zip(COLUMNS, map(float, known), strict=True))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows with the columns of both answers."""
    for r in rows:
        for side in ("chosen", "rejected"):
            r |= {f"{k}_{side}": v for k, v in values(r["prompt"], r[side]).items()}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def trained(study: Study, name: str) -> Path:
    """A reward model's folder."""
    folder = study.folder / f"reward-{name}"
    rows = wordpairs.pairs(200 if study.quick else 4000, 7, length_bonus=BIAS[name])
    run = {
        "model": "lab/words-sft", "objective": "bradley-terry", "optimizer": {"adamw": {"lr": 1e-3}},
        "data": {"train": write(study.folder / f"{name}.jsonl", rows), "max_length": 128},
        "train": {"steps": 3 if study.quick else 200, "batch": 32, "log_every": 50},
    }  # fmt: skip
    if not (folder / "model").is_dir():
        study.train(run, folder.name)
    return folder


def dissected(study: Study, data: str, **judge: Any) -> dict[str, Any]:
    """The probe's result on the pairs of a file."""
    options = {"data": data, "properties": [], "columns": list(COLUMNS), "draws": 30 if study.quick else 250, **judge}
    probe: Any = None  # it is only asked for the run's own pairs
    return part.build("probe", {"preference-properties": {"bootstrap": 5 if study.quick else 200, **options}}).obj(probe)


def judge_of(folder: Path) -> dict[str, Any]:
    """A reward model as a reward part."""
    return {"reward-model": {"model": str(folder), "device": "cpu"}}


def audit(study: Study, models: dict[str, Path]) -> tuple[list[Check], dict[str, Any]]:
    """(1)."""
    held_out = write(study.folder / "held-out.jsonl", wordpairs.pairs(100 if study.quick else 1000, "audit", split="held-out"))
    seen = {name: dissected(study, held_out, judge=judge_of(folder)) for name, folder in models.items()}
    rows = {name: {r["property"]: r for r in found["properties"]} for name, found in seen.items()}
    gap = rows["long"]["length"]["alpha"] - rows["plain"]["length"]["alpha"]
    errors = float(np.hypot(rows["long"]["length"]["se"], rows["plain"]["length"]["se"]))
    alpha = {name: np.array([r[c]["alpha"] for c in COLUMNS]) for name, r in rows.items()}
    apart = gap / max(errors, 1e-9)
    text = "weight of length, biased less plain reward model, in bootstrap standard errors"
    figures = {"audit": seen, "similarity": preferencefit.similarity(alpha["long"], alpha["plain"])}
    return [Check(text, ">= 3", apart, apart >= 3)], figures


def manipulation(study: Study, models: dict[str, Path], seen: dict[str, Any]) -> tuple[list[Check], dict[str, Any]]:
    """(2)."""
    from metier.lab.preferencebench import draw, sft

    prompts = words.prompts(8 if study.quick else 128, "rerank", split="held-out")
    answers = draw(sft(), prompts, 8, seed=3)
    table = [np.array([list(values(p, a).values()) for a in row]) for p, row in zip(prompts, answers, strict=True)]
    gains: dict[str, dict[str, float]] = {}
    for name, folder in models.items():
        by_name = {r["property"]: r["alpha"] for r in seen[name]["properties"]}
        alpha = np.array([by_name[c] for c in COLUMNS])
        score = np.asarray(part.build("reward", judge_of(folder)).obj(prompts, answers, None), float)
        order = [preferencefit.best_first(v, alpha)[[0, -1]] for v in table]
        ends = np.mean([s[o] for s, o in zip(score, order, strict=True)], axis=0)
        gains[name] = {w: float((e - score.mean()) / score.std()) for w, e in zip(("with", "against"), ends, strict=True)}
    up, down = ([g[k] for g in gains.values()] for k in ("with", "against"))
    return [
        Check("best of 8 by the weights: gain of the judge's score over a random one, in sd", ">= 0.5", up, min(up) >= 0.5),
        Check("best of 8 by the negative weights: the same", "< 0", down, max(down) < 0),
    ], {"manipulation": gains}


def letters(study: Study) -> tuple[dict[str, float] | None, list[str]]:
    """(3)."""
    if study.quick:
        return None, []
    data = write(study.folder / "constraints.jsonl", wordpairs.pairs(200, "smollm", constrained=2, reward="constraints"))
    try:
        found = dissected(study, data, judge_model="smollm2-135m-instruct")
    except MetierError as e:
        return None, [f"SmolLM2-135M-Instruct could not be asked: {e}"]
    share = f"SmolLM2-135M-Instruct agrees with {100 * found['agrees_with_data']:.0f} % of 200 choices by constraints."
    return {r["property"]: r["alpha"] for r in found["properties"]}, [share]
