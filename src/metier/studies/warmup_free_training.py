"""How much does each optimizer lose without warmup, at its best learning rate and at twice that?

A Llama of 0.3 M parameters from scratch, constant rate then linear cooldown over the last half. Six arms: AdamW, GI-Adam,
LionA, LionAR, LionAR with the signal-to-noise multiplier (B = 24 sequences), LionAR with β = 0.98, Nesterov and inverse bias
correction. Each arm's rate: the best of three, factors of 2.5 apart, with 10 % warmup on one seed; then {1, 2} x rate x {0, 10 %}
warmup on two seeds; gap = held-out loss without minus with warmup. AdamW under hook/rrc-control (no warmup) is reported
beside them. Traces of single runs: size of AdamW's updates over the learning rate, angles of LionAR's rows, signal-to-noise.

Smaller than the card's check: 100 steps of 24 x 64 tokens instead of 300 of 64 x 128, two seeds instead of three, no third rate.
In so few steps AdamW does not come near its equilibrium (time scale 1/(rate x decay), thousands of steps). The decay that
sets LionAR's angle is therefore 1.0, not 0.1: about the angle per step that AdamW's rows have at their initial length.
"""

import math
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from metier.compare.study import Check, Outcome, Study
from metier.core.guards import NonFiniteError

PARTS = ("optimizer/lion-a", "optimizer/lion-ar", "optimizer/gi-adam", "hook/rrc-control", "probe/update-size")
CLAIM = "AdamW loses much without warmup; optimizers that control angles, or the change of representations, lose little."
SHARP: dict[str, Any] = {"weight_decay": 1.0, "groups": {"embeddings": {"weight_decay": 0.1}}}
HIGH: dict[str, Any] = {"beta": 0.98, "nesterov": True, "inverse_bias_correction": True}
# arm -> optimizer, its options, lowest learning rate tried; what averages over more steps moves less for the same rate
ARMS: dict[str, tuple[str, dict[str, Any], float]] = {
    "adamw": ("adamw", {"beta2": 0.95, "weight_decay": 0.1}, 0.003),
    "gi-adam": ("gi-adam", {"beta2": 0.95, "weight_decay": 0.1}, 0.003),
    "lion-a": ("lion-a", {"weight_decay": 0.1}, 0.006),
    "lion-ar": ("lion-ar", SHARP, 0.006),
    "lion-ar-rrc": ("lion-ar", {**SHARP, "rrc_batch": 24}, 0.006),
    "lion-ar-high": ("lion-ar", {**SHARP, **HIGH}, 0.012),
}
ANGULAR = ("lion-ar", "lion-ar-rrc", "lion-ar-high")


def config(study: Study, arm: str, lr: float, warmup: float, seed: int, **more: Any) -> dict[str, Any]:
    """A run file."""
    (name, options, _), quick = ARMS[arm], study.quick
    return {
        "model": "lab/llama-50k" if quick else "lab/llama-300k",
        "data": {"train": "lab/python", "eval_fraction": 0.05, "eval_limit": 8 if quick else 96, "chunk": True, "max_length": 64},
        "optimizer": {name: {**options, **more, "lr": lr}},
        "schedule": {"wsd": {"decay": 0.5, "shape": "linear", "warmup": warmup}},
        "train": {"steps": 20 if quick else 100, "batch": 4 if quick else 24, "micro_batch": 24, "seed": seed},
    }  # fmt: skip


def loss(study: Study, arm: str, lr: float, warmup: float, seeds: int, hooks: Any = None) -> float:
    """Mean held-out loss over seeds; infinite when a run diverges."""
    found = []
    for seed in range(1 if study.quick else seeds):
        run = config(study, arm, lr, warmup, seed) | ({"hooks": hooks} if hooks else {})
        try:
            done = study.train(run, name=f"{arm}{'-hook' if hooks else ''}-{lr:g}-{warmup:g}-{seed}")
            found.append(done.metrics["eval_loss"])
        except NonFiniteError:
            found.append(math.inf)
    return fmean(found)


def measured(study: Study, arm: str) -> dict[str, Any]:
    """Losses of an arm at its best learning rate and at twice that, with and without warmup."""
    low = ARMS[arm][2]
    tried = [low * f for f in ((1, 2.5) if study.quick else (1, 2.5, 6.25))]
    tuning = {lr: loss(study, arm, lr, 0.1, 1) for lr in tried}
    best = min(tuning, key=tuning.__getitem__)
    without, warmed = ([loss(study, arm, f * best, w, 2) for f in (1, 2)] for w in (0.0, 0.1))
    return {
        "lr": best, "at_edge": best in (tried[0], tried[-1]), "tuning": list(tuning.values()),
        "without": without, "with": warmed, "gap": [a - b for a, b in zip(without, warmed, strict=True)],
    }  # fmt: skip


class Trace:
    """A listener: per step and hidden matrix, the update's root mean square over the rate, mean angle of rows, SNR."""

    def __init__(self) -> None:
        self.rms: list[list[float]] = []
        self.angle: list[list[float]] = []
        self.snr: list[float] = []

    def on_gradients(self, ctx: Any) -> None:
        """Keep the weights."""
        self.params = [p for n, p in ctx.trainable() if p.ndim == 2 and "proj" in n]
        self.old = [p.detach().double() for p in self.params]

    def on_step(self, ctx: Any) -> None:
        """Compare."""
        pairs = [(a, p.detach().double()) for a, p in zip(self.old, self.params, strict=True)]
        self.rms.append([float((b - a).square().mean().sqrt()) / max(ctx.metrics["lr"], 1e-12) for a, b in pairs])
        self.angle.append([float(2 * torch.asin((b - a).norm(dim=1) / 2 / a.norm(dim=1)).mean()) for a, b in pairs])
        stats = [s["stats"].tolist() for p in self.params if "stats" in (s := ctx.optimizer.state[p])]
        decay = 1 - ctx.optimizer.rule.rrc_beta**ctx.clock.step if stats else 1.0
        split = [(g / decay, (g - m) / decay / max(1 - k / decay, 1e-4)) for g, m, k in stats]
        if stats:
            self.snr.append(median((whole - noise) / max(noise, 1e-30) for whole, noise in split))


def trace(study: Study, arm: str, lr: float, **more: Any) -> Trace:
    """One run without warmup, watched."""
    from metier.core import config as configs
    from metier.core.session import open_session

    watch = Trace()
    ready = configs.load(config(study, arm, lr, 0.0, 0, **more), [])
    with open_session(*ready, study.folder / f"trace-{arm}", quiet=True, fresh=True, handle_signals=False) as session:
        session.listeners.append(watch)
        session.train(keep_weights=False)
    return watch


def traced(study: Study, found: dict[str, Any]) -> tuple[list[Check], dict[str, Any]]:
    """What the logs of single runs must show."""
    adam = np.array(trace(study, "adamw", found["adamw"]["lr"]).rms)
    rotated = np.array(trace(study, "lion-ar", found["lion-ar"]["lr"]).angle)
    snr = trace(study, "lion-ar-rrc", found["lion-ar-rrc"]["lr"], rrc_beta=0.5).snr
    half, part = len(adam) // 2, max(2, len(snr) // 20)
    first, late = float(adam[0].mean()), float(adam[half - half // 3 : half].mean(0).min())
    steady = math.sqrt(2 * found["lion-ar"]["lr"] * 1.0 / 19)
    off = float(np.abs(rotated[:half] / math.atan(steady) - 1).max())
    windows = [float(np.mean(snr[max(1, i) : i + part])) for i in range(0, len(snr), part)]
    return [
        Check("AdamW's first update over the learning rate, RMS", "~1 (within 10 %)", first, abs(first - 1) <= 0.1),
        Check("the same in the noisiest layer before the cooldown", "~0.229 (within 25 %)", late, abs(late / 0.229 - 1) <= 0.25),
        Check("LionAR's angle before the cooldown, largest deviation", "constant to 1e-3", off, off <= 1e-3),
        Check("signal-to-noise in the first 5 % of steps", "highest of the run", windows, max(windows) == windows[0]),
    ], {"adamw_rms": adam.mean(1).tolist(), "lion_ar_angle": rotated.mean(1).tolist(), "snr": snr}  # fmt: skip


def run(study: Study) -> Outcome:
    """All arms, then the traces."""
    found = {arm: measured(study, arm) for arm in ARMS}
    adam, high = found["adamw"], found["lion-ar-high"]
    gaps = {arm: found[arm]["gap"][1] for arm in ANGULAR}
    best = min(min(f["without"]) for f in found.values()) - min(adam["with"])
    checks = [
        Check("AdamW's gap at twice its learning rate", ">= 0.05 nat", adam["gap"][1], adam["gap"][1] >= 0.05),
        *(Check(f"gap of {a} there", "<= half of AdamW's", g, g <= adam["gap"][1] / 2) for a, g in gaps.items()),
        Check("gap of lion-ar-high at both", "within 0.02 of zero", high["gap"], all(abs(g) <= 0.02 for g in high["gap"])),
        Check("best loss without warmup above AdamW with warmup", "<= 0.03 nat", best, best <= 0.03),
    ]
    traces, figures = traced(study, found)
    hook = [{"rrc-control": {"until": 0.5}}]
    controlled = [loss(study, "adamw", f * adam["lr"], 0.0, 2, hook) for f in (1, 2)]
    edges = [f"best learning rate of {arm} at the edge of those tried" for arm, f in found.items() if f["at_edge"]]
    return Outcome([*checks, *traces], {"arms": found, "adamw_rrc_control": controlled, **figures}, edges)
