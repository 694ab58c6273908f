"""Made-up comparisons that look like real ones."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from metier.compare.results import Arm, Budget, ComparisonResult, Curve, RunResult, Tuning

ENVIRONMENT = {
    "python": "3.11.9",
    "system": "Linux x86_64",
    "cores": 8,
    "threads": "4",
    "packages": {"metier": "0.1.0", "torch": "2.8.0", "transformers": "5.1.0"},
}


def loss_curve(final: float, steps: int, *, rng: np.random.Generator, noise: float, speed: float) -> Curve:
    """A loss that falls from 8 to ``final`` like a power law, with noise that the last value lacks."""
    x = np.arange(1, steps + 1)
    shape = (x**-0.6 - steps**-0.6) / (1 - steps**-0.6)
    value = final + (8.0 - final) * shape + noise * rng.standard_normal(steps)
    value[-1] = final
    return Curve(
        step=x.tolist(), tokens=(x * 2048).tolist(), seconds=(x * speed).tolist(), value=value.tolist()
    )  # fmt: skip


def run(arm: str, seed: int, metric: float | None, *, trial: int | None = None, **changes) -> RunResult:
    """One run; ``metric`` ``None`` is a diverged one."""
    rng = np.random.default_rng([seed, 0 if trial is None else 1 + trial, len(arm)])
    steps, speed = changes.pop("steps", 80), changes.pop("speed", 0.05)
    final = 2.0 if metric is None else metric
    curve = loss_curve(final, steps, rng=rng, noise=0.05, speed=speed)
    smooth = loss_curve(final, steps, rng=rng, noise=0.0, speed=0.0)
    evals = Curve(**{k: v[9::10] for k, v in smooth.model_dump().items()})
    if metric is None:
        curve.value[steps // 2 :] = [math.nan] * (steps - steps // 2)
    given = dict(
        arm=arm, seed=seed, trial=trial, options={"optimizer.lr": 3e-3}, metric=metric,
        status="done" if metric is not None else "diverged",
        error=None if metric is not None else "the loss is not finite at step 41",
        curve=curve, eval_curve=None if metric is None else evals, seconds=steps * speed, tokens=steps * 2048,
        flops=steps * 2048 * 6.0 * 9e5, peak_bytes=300_000_000, state_bytes=7_200_000, params=900_000,
        folder=f"comparisons/demo/runs/{arm}/seed-{seed}",
    )  # fmt: skip
    return RunResult(**{**given, **changes})


def arm(name: str, is_control: bool) -> Arm:
    """An arm that differs in its optimizer."""
    return Arm(name=name, label=name, overrides={"optimizer": {name: {"lr": 3e-3}}}, is_control=is_control)


def comparison(
    metrics: Mapping[str, Sequence[float | None]],
    *,
    control: str,
    minimum_effect: float = 0.0,
    lower_is_better: bool = True,
    runs: Sequence[RunResult] = (),
    tuning: Sequence[Tuning] = (),
    **changes,
) -> ComparisonResult:
    """A comparison whose final runs have the given values per arm and seed."""
    seeds = list(range(len(next(iter(metrics.values())))))
    finals = [run(a, s, v) for a, vs in metrics.items() for s, v in zip(seeds, vs, strict=True)]
    given = dict(
        name="demo", question="Does it reach a lower loss?", metric="eval_loss",
        lower_is_better=lower_is_better,
        budget=Budget(kind="tokens", amount=163840), minimum_effect=minimum_effect,
        arms=[arm(a, a == control) for a in metrics],
        seeds=seeds, tuning=list(tuning), runs=[*runs, *finals], environment=ENVIRONMENT,
        commands=["metier compare recipes/demo.yaml"], created="2026-01-02T03:04:05Z", code_hash="ab" * 32,
        notes=[],
    )  # fmt: skip
    return ComparisonResult(**{**given, **changes})


def demo() -> ComparisonResult:
    """One arm that holds, one unclear, one that fails on a seed, and the control; tuned, three seeds."""
    rng = np.random.default_rng(0)
    means = {"muon": 2.21, "lion": 2.318, "sgd-momentum": 2.74, "adamw": 2.33}
    shared = 0.03 * rng.standard_normal(3)
    metrics: dict[str, list[float | None]] = {
        arm: [float(m + s + 0.01 * rng.standard_normal()) for s in shared] for arm, m in means.items()
    }
    metrics["sgd-momentum"][1] = None
    grids = {"muon": [1.2e-3, 3e-3, 7.5e-3], "lion": [2e-4, 5e-4, 1.25e-3], "adamw": [1.2e-3, 3e-3, 7.5e-3]}
    grids["sgd-momentum"] = [0.1, 0.3, 1.0]
    tuned = {
        "muon": [2.52, 2.44, 2.49], "lion": [2.60, 2.55, 2.58], "adamw": [2.61, 2.56, 2.63],
        "sgd-momentum": [2.9, 2.8, None],
    }  # fmt: skip
    tuned["adamw"] = [2.66, 2.60, 2.56]
    tuning, trials = [], []
    for arm, values in grids.items():
        metric = tuned[arm]
        best = min((m, v) for m, v in zip(metric, values, strict=True) if m is not None)[1]
        tuning.append(Tuning(arm=arm, parameter="optimizer.lr", values=values, metric=metric, best=best))
        trials += [
            run(arm, 1000, m, trial=i, options={"optimizer.lr": v}, steps=40)
            for i, (v, m) in enumerate(zip(values, metric, strict=True))
        ]
    result = comparison(
        metrics, control="adamw", minimum_effect=0.02, runs=trials, tuning=tuning,
        question="Do Muon and Lion reach a lower loss than AdamW on a small language model, at equal tokens?",
        notes=["adamw: the best optimizer.lr (0.0075) is at the edge of what was tried"],
    )  # fmt: skip
    for r in result.runs:
        if r.arm == "muon":
            slower = [s * 1.3 for s in r.curve.seconds]
            r.seconds, r.curve.seconds, r.state_bytes = r.seconds * 1.3, slower, r.state_bytes // 2
    return result
