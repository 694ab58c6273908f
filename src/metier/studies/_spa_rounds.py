"""Rounds of pairs that a model makes of its own answers, equally many for every arm: the runs of the study spa."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core import config, session
from metier.core.context import Context
from metier.core.errors import MetierError
from metier.lab import preferencebench
from metier.studies import _self_training as own

SEED_RATES, MOST_KL, RATES = (1e-4, 3e-4, 1e-3, 3e-3), 10.0, (3e-5, 1e-4, 3e-4)
OPTIONS: dict[str, dict[str, Any]] = {"spa-plain": {"alpha": 0.0}, "spa": {}, "spa-extrapolated": {"lam": 0.5}}
"""Of the objective, for the arms whose labels are the model's own."""
ARMS = (*OPTIONS, "reward-model", "gold")
RM_RATE, TUNE, SEEDS, BATCH = 3e-3, 100, (0, 1, 2), 30


@dataclass
class Bench:
    """Runs of the study."""

    study: Study
    pairs: int = 600
    """Of a round."""
    samples: int = 512
    seed_rate: float = SEED_RATES[1]
    few: dict[str, int] = field(default_factory=dict)
    """Rounds that gave fewer different pairs, and how many."""

    @cached_property
    def base(self) -> Any:
        """The model at the start."""
        return preferencebench.sft()

    def measured(self, folder: Path | None, choosing: bool = False) -> dict[str, float]:
        """Figures of a run's result, or of the model at the start."""
        return own.measured(folder, self.base, self.samples, choosing=choosing)

    def seed_score(self, lr: float) -> float:
        """Gold reward of the seeds alone; nan where the KL is too large."""
        found = self.measured(self.on_pairs("dpo", TUNE, lr), choosing=True)
        return found["gold_reward"] if found["kl"] <= MOST_KL else math.nan

    def score(self, arm: str, lr: float) -> float:
        """Gold reward of an arm by which its rate is chosen; nan where a round had too few pairs."""
        try:
            return self.measured(self.arm(arm, TUNE, lr, 2), choosing=True)["gold_reward"]
        except MetierError:
            return math.nan

    def on_pairs(self, objective: str, seed: int, lr: float) -> Path:
        """Three epochs of the 60 labelled pairs."""
        rows = preferencebench.sampled_pairs(self.base, 70, seed)[:60]
        return own.trained(self.study, f"{objective}-{seed}-{lr:g}", {
            "model": own.MODEL, "objective": objective,
            "data": {"train": own.written(self.study.folder / f"seeds-{seed}.jsonl", rows), "max_length": 64},
            **own.settings(lr, 9, 20, seed),
        })  # fmt: skip

    def made(self, arm: str, seed: int, before: Path, name: str, number: int) -> str:
        """The round's pairs: answers of the model before it, labelled as the arm does, in a run of one step that is thrown away.

        Too few are repeated, and counted in ``few``; ``MetierError`` when they do not fill a batch.
        """
        data = own.prompts_file(self.study.folder / f"prompts-{seed}-{number}.jsonl", 5 * self.pairs, f"spa {seed} {number}")
        source: dict[str, Any] = {"max_new_tokens": preferencebench.MAX_NEW, "temperature": 0.7}
        if arm not in OPTIONS:
            judge = own.judge(self.study.folder)
            if arm == "reward-model":
                judge = {"reward-model": {"model": str(self.on_pairs("bradley-terry", seed, RM_RATE)), "device": "cpu"}}
            source["reward"] = judge
        folder = own.trained(self.study, f"made-{name}", {
            "model": str(before / "model"), "reference": own.MODEL, "objective": "dpo", **own.settings(1e-5, 1, BATCH, seed),
            "data": {"train": data, "max_length": 64, "source": {"spa" if arm in OPTIONS else "online-dpo": source}},
        })  # fmt: skip
        rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in own.made_rows(folder, 1)]
        if len(rows) < min(BATCH, self.pairs):
            raise MetierError(f"{name}: {len(rows)} pairs do not fill a batch")
        if len(rows) < self.pairs:
            self.few[f"{arm}, seed {seed}, round {number}"] = len(rows)
        return own.written(self.study.folder / f"{name}.jsonl", [rows[i % len(rows)] for i in range(self.pairs)])

    def run_file(self, arm: str, seed: int, lr: float, number: int) -> dict[str, Any]:
        """One round, from the model before it, which is the reference too."""
        before = self.on_pairs("dpo", seed, self.seed_rate) if number == 1 else self.arm(arm, seed, lr, number - 1)
        # in the first round all arms that label alike have the same pairs
        name = f"pairs-{'self' if arm in OPTIONS else arm}-{seed}-1" if number == 1 else f"pairs-{arm}-{seed}-{lr:g}-{number}"
        return {
            "model": str(before / "model"), "objective": {"spa": OPTIONS[arm]} if arm in OPTIONS else "dpo",
            "schedule": "constant",
            "data": {"train": self.made(arm, seed, before, name, number), "max_length": 64},
            **own.settings(lr, self.pairs // BATCH, BATCH, seed),
        }  # fmt: skip

    def arm(self, arm: str, seed: int, lr: float, number: int) -> Path:
        """The run of an arm's round."""
        return own.trained(self.study, f"{arm}-{seed}-{lr:g}-{number}", self.run_file(arm, seed, lr, number))

    def labels(self, seed: int, lr: float) -> dict[str, float]:
        """How right the labels of SPA's first round are, and whether the objective doubted, and softened, them in training."""
        run = self.run_file("spa", seed, lr, 1)
        parsed, document = config.load(run)
        folder, watch = self.study.folder / f"watched-{seed}-{lr:g}", Watch()
        with session.open_session(parsed, document, folder, quiet=True, fresh=True, handle_signals=False) as s:
            watch.objective = s.resolved.objective.built.obj
            s.listeners.append(watch)
            s.train(keep_weights=False)
        rows = own.read(run["data"]["train"])
        gap, flagged = own.gaps(rows), np.array([watch.doubted[i] for i in range(1, len(rows) + 1)])
        return {
            "accuracy": own.right(gap), "doubted": own.right(gap[flagged]), "trusted": own.right(gap[~flagged]),
            "share_doubted": float(flagged.mean()), "share_softened": len(watch.softened) / len(rows),
            "longer": own.mean(len(r["chosen"].split()) - len(r["rejected"].split()) for r in rows),
        }  # fmt: skip


@dataclass
class Watch:
    """Which pairs, by the row of the file, the objective doubted in the step that trained on them, and whose it softened."""

    objective: Any = None
    doubted: dict[int, bool] = field(default_factory=dict)
    softened: set[int] = field(default_factory=set)

    def on_step(self, ctx: Context) -> None:
        """The step's margins are the last ones of the window."""
        rows = [int(i.rpartition(":")[2]) for layout in ctx.layouts for i in layout.ids]
        low = self.objective.threshold()
        now = {i: c < low for i, c in zip(rows, self.objective.margins[-len(rows) :], strict=True)}
        self.doubted |= now
        if self.objective.alpha and self.objective.progress >= self.objective.warmup:
            self.softened |= {i for i, is_low in now.items() if is_low}
