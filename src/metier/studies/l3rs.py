"""Does a learned layer-wise controller beat a tuned Adam, and a random search that may run as many runs as learning it took?

A Llama of 50 k parameters, pretrained for 300 steps on Python's documentation, is fine-tuned on Python's sources: 40 steps of
8 sequences of 64 tokens, constant rate. The sources are dealt into six shards. On the first, λ_ref is picked from 5 values
and the controller learned in 10 iterations of 6 antithetic pairs (σ 0.1, Adam 0.05, set beforehand); Adam gets 8 rates and
SGD 8, each with 2 seeds; the random search draws rate multipliers of six groups of tensors around Adam's best, log-uniform
in [1/8, 8], the last 24 of its runs going to three more seeds of its best eight. The other five shards are what the arms are
compared on, with 3 seeds; "unlearned" is the optimizer without a controller. Smaller than the card's check: 40 steps of 512
tokens instead of 60 of 1024, 120 inner runs instead of 640, deployment on the very model that was learned on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import api, metatrain
from metier.core.evolution import Settings
from metier.core.guards import NonFiniteError
from metier.core.runfolder import write_json
from metier.lab import corpus

PARTS = ("optimizer/l3rs",)
CLAIM = "A meta-trained layer-wise controller fine-tunes faster than a tuned Adam, on data and for lengths it was not learned on."
STEPS, EVERY = 40, 4
GRIDS = {n: [a * 2**k for k in range(m)] for n, a, m in (("adamw", 1e-3, 8), ("sgd-momentum", 0.1, 8), ("l3rs", 0.05, 5))}
GROUPS = ("*.embed_tokens.*", "*.0.self_attn.*", "*.1.self_attn.*", "*.0.mlp.*", "*.1.mlp.*", "*norm*")
SEARCH = Settings(sigma=0.1, pairs=6, lr=0.05)
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Bench:
    """Runs whose curves are kept in the study's folder, by name."""

    study: Study
    model: str

    def spec(self, optimizer: Mapping[str, Any], shard: int = 0, seed: int = 1, steps: int = STEPS) -> dict[str, Any]:
        """One fine-tuning."""
        data: dict[str, Any] = {"train": str(self.study.folder / f"shard-{shard}.jsonl"), "eval_fraction": 0.1, "chunk": True}
        data |= {"max_length": 64, "eval_limit": 4 if self.study.quick else 64}
        train = {"steps": steps // (20 if self.study.quick else 1), "batch": 8, "seed": seed}
        return {"model": self.model, "data": data, "optimizer": optimizer, "schedule": "constant", "train": train}

    def curve(self, name: str, optimizer: Mapping[str, Any], shard: int = 0, seed: int = 1, steps: int = STEPS) -> Curve:
        """Steps and held-out losses; empty when the run diverges."""
        kept = self.study.folder / "curves" / f"{name}-{shard}-{seed}-{steps}.json"
        if not kept.is_file():
            run, out = self.spec(optimizer, shard, seed, steps), self.study.folder / "run"
            run["train"]["eval_every"] = EVERY if shard else None
            try:
                done = api.train(run, out=out, quiet=True, resume=False, keep_weights=False, handle_signals=False)
                seen = [(e["step"], e["eval_loss"]) for e in done.events if e["event"] == "eval"]
            except NonFiniteError:
                seen = []
            write_json(kept, seen)
        return [(s, float("inf") if x is None else x) for s, x in json.loads(kept.read_text(encoding="utf-8"))]

    def mean(self, name: str, optimizer: Mapping[str, Any], seeds: Sequence[int] = (1, 2)) -> float:
        """Loss on the shard that everything is tuned on."""
        return float(np.mean([last(self.curve(name, optimizer, seed=s)) for s in seeds]))


def run(study: Study) -> Outcome:
    """Tune, learn, search; then everything on the other shards."""
    bench = Bench(study, prepare(study))
    few = slice(2, 4) if study.quick else slice(None)
    sweeps = {part: {v: bench.mean(f"{part}-{v:g}", {part: {"lr": v}}) for v in grid[few]} for part, grid in GRIDS.items()}
    adam, sgd, length = (min(s, key=s.__getitem__) for s in sweeps.values())
    found = metatrain.metatrain(
        bench.spec({"l3rs": {"lr": length}}), out=study.folder / "controller.safetensors",
        iterations=1 if study.quick else 10, settings=Settings(pairs=1) if study.quick else SEARCH,
    )  # fmt: skip
    groups, searched = random_search(bench, adam, budget := found.runs + 2 * len(sweeps["l3rs"]))
    arms: dict[str, dict[str, Any]] = {
        "l3rs": {"l3rs": {"lr": length, "controller": str(found.file)}}, "unlearned": {"l3rs": {"lr": length}},
        "sgd": {"sgd-momentum": {"lr": sgd}}, "adam": {"adamw": {"lr": adam}},
        "adam-groups": {"adamw": {"lr": adam, "groups": groups}},
    }  # fmt: skip
    cells = [(1, 11)] if study.quick else list(product((1, 2, 3, 4, 5), (11, 12, 13)))
    curves = {arm: [bench.curve(arm, o, *cell) for cell in cells] for arm, o in arms.items()}
    longer = {a: [last(bench.curve(a, arms[a], *cell, steps=2 * STEPS)) for cell in cells] for a in ("l3rs", "adam")}
    figures = {
        **compared(curves), "loss_twice_as_long": {a: float(np.mean(v)) for a, v in longer.items()}, "runs_to_learn": budget,
        "sweeps": sweeps, "groups": groups, "random_search": searched, "meta_history": found.history,
    }  # fmt: skip
    edge = [f"The best rate of {n} is at an end." for n, s in sweeps.items() if min(s, key=s.__getitem__) in (min(s), max(s))]
    return Outcome(checks=checks(figures["loss"], longer), figures=figures, notes=edge)


def compared(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Mean losses, differences with their spread over the cells, and steps to Adam's loss as a fraction of Adam's."""
    final = {a: np.array([last(c) for c in found]) for a, found in curves.items()}
    return {
        "loss": {a: float(x.mean()) for a, x in final.items()},
        "l3rs_minus": {a: [float((final["l3rs"] - x).mean()), float((final["l3rs"] - x).std())] for a, x in final.items()},
        "steps_to_adams_loss": {a: float(np.mean(list(map(reached, c, curves["adam"])))) for a, c in curves.items()},
    }


def checks(loss: dict[str, float], longer: dict[str, list[float]]) -> list[Check]:
    """The card's predictions with its margins."""
    adam, groups = (loss["l3rs"] - loss[arm] for arm in ("adam", "adam-groups"))
    after = float(np.mean(longer["l3rs"]) - np.mean(longer["adam"]))
    return [
        Check("final loss of L3RS above a tuned Adam's", "<= -0.02 nat", adam, adam <= -0.02),
        Check("final loss of L3RS above that of a random search with as many runs", "<= -0.02 nat", groups, groups <= -0.02),
        Check("final loss of L3RS above Adam's after twice the steps learned for", "<= 0.02 nat", after, after <= 0.02),
    ]


def random_search(bench: Bench, lr: float, runs: int) -> tuple[dict[str, Any], list[float]]:
    """The best of random multipliers per group of tensors (the first all 1), and all first losses; ``runs`` runs in all."""
    again = 1 if bench.study.quick else 8
    drawn = 8 ** np.random.default_rng(0).uniform(-1, 1, (max(1, runs - 3 * again), len(GROUPS)))
    drawn[0] = 1.0
    made = [{g: {"lr_scale": float(f"{x:.4g}")} for g, x in zip(GROUPS, row, strict=True)} for row in drawn]

    def loss(i: int, *seeds: int) -> float:
        return bench.mean(f"random-{i}", {"adamw": {"lr": lr, "groups": made[i]}}, seeds)

    first = [loss(i, 1) for i in range(len(made))]
    return made[min(np.argsort(first)[:again], key=lambda i: loss(int(i), 1, 2, 3, 4))], first


def last(curve: Curve) -> float:
    """The final loss; infinite when the run has diverged."""
    return curve[-1][1] if curve else float("inf")


def reached(there: Curve, adam: Curve) -> float:
    """Steps to Adam's last loss over Adam's steps, at the evaluations; infinite when it is never reached."""
    return next((s for s, x in there if x <= last(adam)), float("inf")) / adam[-1][0]


def prepare(study: Study) -> str:
    """The model that every run starts from; the shards are dealt to files."""
    for i in range(6):
        rows = [json.dumps({"text": d["text"]}) for d in corpus.documents("lab/stdlib")[i::6]]
        (study.folder / f"shard-{i}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = {
        "model": "lab/llama-50k", "data": {"train": "lab/pydoc", "chunk": True, "max_length": 64},
        "optimizer": {"adamw": {"lr": 5e-3}}, "train": {"steps": 3 if study.quick else 300, "batch": 16},
    }  # fmt: skip
    return str(study.train(run, name="pretrained").folder / "model")
