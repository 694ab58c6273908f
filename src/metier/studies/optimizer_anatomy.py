"""Are all optimizers but SGD level, in loss and in how wide the window of good learning rates is; and is an adaptive
rule in output layer and norms enough? Sophia is an arm too, outside the card's margins.

The card's protocol on a Llama of 0.4 M parameters with 2048 vocabulary entries and an untied output layer, trained from
scratch: equal tokens, 5 learning rates at factor √10 for every arm, cosine with 10 % warmup, no weight decay. Smaller
than the card's check: 100 steps of 1536 tokens instead of 300 of 4096. The hybrids' ratio of trunk to adaptive learning
rate is that of the best learning rates of SGD and AdamW found here, and then their common factor is swept. The window is
what the five trials show, so at most 5 half-decades, each trial from one seed. Gradients are clipped to a global norm of
1, as runs do by default. The initial weights are the same for all seeds (data order varies), which understates the
spread between models; so short a run may show less of SGD's distance than the paper's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metier.compare.results import ComparisonResult
from metier.compare.study import Check, Outcome, Study

PARTS = (
    "optimizer/sgd-momentum", "optimizer/adamw", "optimizer/adafactor", "optimizer/lion", "optimizer/signum",
    "optimizer/sophia", "optimizer/adalayer", "optimizer/adalayer-star", "optimizer/adaptive-subset",
)  # fmt: skip
CLAIM = (
    "Adam, Adafactor, Lion and Signum reach about the same loss with near-identical sensitivity to the learning rate; SGD is "
    "clearly worse; adaptivity in the output layer and the norms, with SGD elsewhere, keeps loss and stability."
)
FACTORS = [0.1, 0.316, 1.0, 3.16, 10.0]
ARMS: dict[str, dict[str, Any]] = {
    "sgd-momentum": {"lr": 3.0},
    "adamw": {"lr": 1e-2, "beta2": 0.95},
    "adafactor": {"lr": 5e-3, "beta2": 0.95, "clip": None},
    "lion": {"lr": 2e-3},
    "signum": {"lr": 2e-3},
    "sophia": {"lr": 2e-3},
    "adalayer": {"lr": 3e-3},
    "adalayer-star": {"lr": 3e-3},
}
"""Centres of the sweeps, near each arm's best in a shorter preliminary sweep (50 steps of 1024 tokens)."""
LEVEL = ("adamw", "adafactor", "lion", "signum", "adalayer-star")
WINDOW = 0.1
"""Nats above an arm's best trial within which a learning rate counts as good."""


def run(study: Study) -> Outcome:
    """Two comparisons: the whole-model optimizers, then the hybrids at the ratio of learning rates that the first gives."""
    model = untied(study)
    main = study.compare(design(study, model, {n: {n: o} for n, o in ARMS.items()}, "adamw"), name="main")
    best = {t.arm: t.best for t in main.tuning}
    ratio = best["sgd-momentum"] / best["adamw"]
    options = {"lr": best["sgd-momentum"], "ratio": ratio}
    hybrids = {f"hybrid-{on}": {"adaptive-subset": {**options, "on": on}} for on in ("both", "head")}
    second = study.compare(design(study, model, hybrids, "hybrid-both"), name="hybrids")
    arms = {**summary(main), **summary(second)}
    edge = [t.arm for t in (*main.tuning, *second.tuning) if t.at_edge]
    notes = [f"The best learning rate is at an end of the sweep for {', '.join(edge)}."] if edge else []
    return Outcome(checks=checks(arms), figures={"arms": arms, "trunk_to_adaptive_lr": ratio}, notes=notes)


def untied(study: Study) -> str:
    """Folder of a lab model whose output layer is not tied to the embedding table, with random weights."""
    import torch

    from metier.core import models

    folder: Path = study.folder / "untied"
    if not (folder / "model.safetensors").is_file():
        bundle = models.load("lab/llama-50k" if study.quick else "lab/llama-300k")
        config = bundle.model.config
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        models.save(models.replace_model(bundle, type(bundle.model)(config)), folder)
    return str(folder.resolve())


def design(study: Study, model: str, arms: Mapping[str, dict[str, Any]], control: str) -> dict[str, Any]:
    """Arms on the same tokens, each with its own sweep of the learning rate."""
    return {
        "run": {
            "model": model,
            "data": {
                "train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if study.quick else 128, "chunk": True,
                "max_length": 64,
            },
            "optimizer": "adamw",
            "schedule": {"cosine": {"warmup": 0.1}},
            "train": {"steps": 4 if study.quick else 100, "batch": 4 if study.quick else 24},
        },
        "arms": {name: {"optimizer": ref} for name, ref in arms.items()},
        "control": control,
        "tune": {"option": "optimizer.lr", "factors": FACTORS[1:3] if study.quick else FACTORS},
        "seeds": 1 if study.quick else 2,
    }  # fmt: skip


def summary(result: ComparisonResult) -> dict[str, dict[str, Any]]:
    """Of every arm: mean final loss, its spread, the sweep, and the number of half-decades in the window."""
    found = {}
    for tuned in result.tuning:
        losses = [r.metric for r in result.finals(tuned.arm)]
        ran = [x for x in losses if x is not None]
        seen = [m for m in tuned.metric if m is not None]
        found[tuned.arm] = {
            "loss": sum(ran) / len(ran) if ran and len(ran) == len(losses) else float("inf"),
            "losses": losses, "best_lr": tuned.best, "lrs": tuned.values, "sweep": tuned.metric,
            "window": sum(m <= min(seen) + WINDOW for m in seen),
        }  # fmt: skip
    return found


def checks(arms: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """The card's predictions with its margins."""
    loss = {n: float(a["loss"]) for n, a in arms.items()}
    width = {n: int(a["window"]) for n, a in arms.items()}
    spread = max(loss[n] for n in LEVEL) - min(loss[n] for n in LEVEL)
    behind, apart = loss["sgd-momentum"] - loss["adamw"], loss["hybrid-both"] - loss["adamw"]
    narrower = [width["hybrid-both"], width["adamw"]]
    return [
        Check("largest distance among AdamW, Adafactor, Lion, Signum and Adalayer*", "< 0.06 nat", spread, spread < 0.06),
        Check("SGD with momentum above AdamW", "> 0.1 nat", behind, behind > 0.1),
        Check("the hybrid (head and norms) above AdamW", "< 0.06 nat", apart, apart < 0.06),
        Check("windows of the hybrid (head and norms) and of AdamW, in half-decades", "at most 1 fewer", narrower,
              narrower[0] >= narrower[1] - 1),
        Check("windows of the hybrids head only, and head and norms", "the first narrower",
              [width["hybrid-head"], width["hybrid-both"]], width["hybrid-head"] < width["hybrid-both"]),
    ]  # fmt: skip
