"""Does accuracy before memorisation predict test accuracy better than plain training accuracy and training loss do?

Sums of two numbers of two digits, worked out digit by digit, in three surface forms. A Llama of 0.3 M parameters first learns
those without a carry; then 12 fine-tuning runs on sums with and without: 3 learning rates, 2 or 6 epochs, 800 or 200
questions. After every epoch: 5 samples for each of 80 training and 80 test questions. p is calibrated on the runs of the middle
learning rate and judged on the others. Example level: the longest runs at their end, with "First ," put before the
solution. R² is of a line through all (run, epoch).

Smaller than the card's check: two digits instead of three, 800 training questions instead of 2000, 80 instead of 400 measured, 6
epochs instead of 10, no arm that collects more data around questions of low PM, one seed.
"""

import json
import random
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import checkpoint, config, part, probing
from metier.core.session import open_session
from metier.core.trained import read_record
from metier.parts.probe.pre_memorization_accuracy import calibrated, pre_memorization, r_squared

PARTS = ("probe/pre-memorization-accuracy",)
CLAIM = "Accuracy on training questions before their solutions are memorised predicts test accuracy, plain accuracy does not."
LRS, EPOCHS, SHARES = (3e-4, 1e-3, 3e-3), (2, 6), (1, 4)
CANDIDATES = tuple(float(np.exp(x)) for x in np.geomspace(0.003, 0.7, 25))
FORMS = ("Sum {} and {} :", "Add {} to {} :", "What is {} plus {} ?")


def run(study: Study) -> Outcome:
    """Data, base, the runs with their tables, and the checks."""
    files, size = written(study), "lab/llama-50k" if study.quick else "lab/llama-300k"
    first = {"steps": 4 if study.quick else 500, "batch": 8 if study.quick else 64}
    base = str(study.train(fitted(size, files["easy"], 3e-3, first), name="base").folder / "model")
    lrs, epochs, shares = (LRS[:2], EPOCHS[:1], SHARES[:1]) if study.quick else (LRS, EPOCHS, SHARES)
    seen: dict[str, dict[str, Any]] = {}
    for lr, n, share in product(lrs, epochs, shares):
        name = f"lr-{lr:g}-epochs-{n}-share-{share}"
        seen[name] = {"lr": lr, "epochs": n, **measured(study, base, files, name, lr, n, share)}
    return judged(seen, lrs[len(lrs) // 2])


def question(a: int, b: int, form: str, begin: str = "") -> dict[str, str]:
    """A sum with its solution; with ``begin`` the solution's beginning belongs to the question."""
    low = a % 10 + b % 10
    carry, high = low // 10, a // 10 + b // 10 + low // 10
    digits = [" ".join(f"{x:02d}") for x in (a, b)]
    text = f" {a % 10} + {b % 10} = {low} , {a // 10} + {b // 10} + {carry} = {high} .\n#### {a + b}"
    if begin:
        return {"prompt": f"{form.format(*digits)}\n{begin}", "completion": text}
    return {"question": form.format(*digits), "answer": text}


def written(study: Study) -> dict[str, Path]:
    """Files of questions: easy ones, training ones, a quarter of them, those measured, and test ones."""
    rng = random.Random(0)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    rng.shuffle(pairs)
    full, few = (32, 8) if study.quick else (800, 80)  # the first as in measured()
    rows = [(a, b, rng.choice(FORMS)) for a, b in pairs]
    train, test, rest = rows[:full], rows[full : full + few], rows[full + few :]
    easy = [r for r in rest if r[0] % 10 + r[1] % 10 < 10 and r[0] // 10 + r[1] // 10 < 10]
    parts = {"easy": easy, "1": train, "4": train[: full // 4], "seen": train[:few], "test": test}
    made = {name: [question(*r) for r in chosen] for name, chosen in parts.items()}
    made["begun"] = [question(*r, begin="First ,") for r in train[:few]]
    for name, found in made.items():
        (study.folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")
    return {name: study.folder / f"{name}.jsonl" for name in made}


def fitted(model: str, data: Path, lr: float, train: dict[str, Any]) -> dict[str, Any]:
    """A run on questions."""
    return {
        "model": model, "data": {"train": str(data), "max_length": 96}, "optimizer": {"adamw": {"lr": lr, "weight_decay": 0.01}},
        "schedule": {"linear": {"warmup": 0.05}}, "train": {**train, "clip": 2.0},
    }  # fmt: skip


def measured(study: Study, base: str, files: dict[str, Path], name: str, lr: float, epochs: int, share: int) -> dict[str, Any]:
    """One run, its tables at every epoch, and its accuracy after another beginning."""
    batch, rows = (8, 32) if study.quick else (32, 800)
    train = {"epochs": epochs, "batch": batch, "save_every": -(-rows // share // batch), "keep": epochs + 1}
    done = study.train(fitted(base, files[str(share)], lr, train), name=name)
    asked = {k: probed(done.folder, files[k], study.quick, all=k != "begun") for k in ("seen", "test", "begun")}
    return {
        "acc": np.array(asked["seen"]["accuracy"]), "ppl": np.array(asked["seen"]["perplexity"]),
        "test": np.array(asked["test"]["accuracy"]).mean(1), "begun": np.array(asked["begun"]["accuracy"])[-1],
    }  # fmt: skip


def probed(folder: Path, data: Path, quick: bool, *, all: bool) -> dict[str, Any]:
    """Tables ``[epochs, questions]`` of a run, or of its end, on the questions of a file, in its order."""
    probe = part.build(
        "probe", {"pre-memorization-accuracy": {"samples": 2 if quick else 5, "max_new_tokens": 8 if quick else 32}}
    )
    record = read_record(folder)["run"]
    settings, document = config.load({**record, "data": {**record["data"], "eval": str(data), "eval_limit": None}}, [])
    with (
        tempfile.TemporaryDirectory() as aside,
        open_session(settings, document, Path(aside), quiet=True, handle_signals=False) as session,
    ):
        checkpoint.resume(session, folder, data=False)
        with probing.undisturbed(probing.probe_session(session, on="eval", folder=folder if all else None)) as seen:
            found = probe.obj(seen)
    order = np.argsort([int(e["id"].rsplit(":", 1)[1]) for e in found["examples"]])
    return {k: np.array(v)[:, order].tolist() for k, v in found["tables"].items()}


def judged(seen: dict[str, dict[str, Any]], middle: float) -> Outcome:
    """The card's predictions with its margins."""
    p = calibrated([(r["acc"], r["ppl"], r["test"]) for r in seen.values() if r["lr"] == middle], CANDIDATES)
    other = [r for r in seen.values() if r["lr"] != middle]
    tables = [pre_memorization(r["acc"], r["ppl"], p) for r in other]
    test = np.concatenate([r["test"] for r in other])
    loss, acc = [-np.log(r["ppl"]).mean(1) for r in other], [r["acc"].mean(1) for r in other]
    by = {k: np.concatenate(v) for k, v in {"pm": [t.mean(1) for t in tables], "accuracy": acc, "loss": loss}.items()}
    r2 = {k: r_squared(x, test) for k, x in by.items()}  # type: ignore[arg-type]
    lead, off = r2["pm"] - max(r2["accuracy"], r2["loss"]), float(np.abs(by["pm"] - test).mean())
    longest = [(r, t) for r, t in zip(other, tables, strict=True) if r["epochs"] == max(x["epochs"] for x in other)]
    plain = float(np.mean([abs(r["acc"][-1].mean() - r["test"][-1]) for r, _ in longest]))
    halves = [split(t[-1], r["acc"][-1], r["begun"]) for r, t in longest]
    gap = float(np.mean([h for h in halves if h is not None])) if any(h is not None for h in halves) else None
    means = {n: {"test": r["test"], **{k: r[k].mean(1) for k in ("acc", "ppl")}} for n, r in seen.items()}
    for name, r in seen.items():
        means[name]["pm"] = pre_memorization(r["acc"], r["ppl"], p).mean(1)
    figures = {"p": p, "r2": r2, "runs": {n: {k: v.tolist() for k, v in m.items()} for n, m in means.items()}}
    checks = [
        Check("R² of PM with test accuracy", ">= 0.85", r2["pm"], r2["pm"] >= 0.85),
        Check("R² of PM above those of accuracy and of loss", ">= 0.1", lead, lead >= 0.1),
        Check("mean |PM - test accuracy|", "<= 0.08", off, off <= 0.08),
        Check("|training - test accuracy| at the end of the longest runs", "> 0.15", plain, plain > 0.15),
        Check(
            "accuracy after another beginning, high-PM half above the low one", ">= 0.05", gap, gap is not None and gap >= 0.05
        ),
    ]
    return Outcome(checks, figures, [] if gap is not None else ["Too few finally correct questions for the example level."])


def split(pm: np.ndarray, acc: np.ndarray, begun: np.ndarray) -> float | None:
    """Mean of ``begun`` in the half of high PM less that in the low half, among questions answered right in the end."""
    right = np.flatnonzero(acc > 0.5)
    if len(right) < 8:
        return None
    order, half = right[np.argsort(pm[right], kind="stable")], len(right) // 2
    return float(begun[order[-half:]].mean() - begun[order[:half]].mean())
