"""Can a model that has learnt from 60 labelled pairs label its own answers and go on?

The bench's word model, whose gold reward is known; 60 pairs of its own answers with Bradley-Terry labels, then two rounds of 600
new prompts with two answers each at temperature 0.7, every round with the model before it as the reference. Arms: the seeds
alone (DPO, 3 epochs), SPA without refinement, with α = 0.1, with λ = 0.5 besides, labels of a reward model trained on the same
seeds, and labels of the gold reward. The learning rate of the seed stage and that of every arm are chosen among three by gold
reward with one seed; three other seeds are then run. Doubted pairs are those that the objective of the α = 0.1 arm did doubt
when it trained on them, in rounds of one pass. Rounds are 20 steps of 30 pairs; a reward counts as one sd of the start's answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Check, Outcome, Study
from metier.core import config, session
from metier.core.context import Context
from metier.lab import preferencebench
from metier.studies import _self_training as own

PARTS = ("source/spa", "objective/spa", "hook/tr-dpo")
CLAIM = "From 3 % of the labels, a model that labels its own answers by its implicit reward beats training on those labels alone."
SEED_RATES, RATES, RM_RATE = (3e-4, 1e-3, 3e-3), (3e-5, 1e-4, 3e-4), 3e-3
ARMS = ("spa-plain", "spa", "spa-extrapolated", "reward-model", "gold")
TUNE, SEEDS, BATCH = 100, (0, 1, 2), 30
FOLLOWED = {"tr-dpo": {"share": 1.0, "every": "round"}}


def run(study: Study) -> Outcome:
    """Tune, run, compare."""
    bench = Bench(study, 60, samples=32) if study.quick else Bench(study)
    seeds, choices = SEEDS[:1] if study.quick else SEEDS, {}
    if not study.quick:
        bench.seed_rate, choices["seeds"] = own.best_of(
            SEED_RATES, lambda lr: bench.measured(bench.on_pairs("dpo", TUNE, lr))["gold_reward"]
        )
    rates = dict.fromkeys(ARMS, RATES[1])
    for arm in () if study.quick else ARMS:
        rates[arm], choices[arm] = own.best_of(RATES, lambda lr, a=arm: bench.arm(a, TUNE, lr)["gold_reward"])
    found = {arm: [bench.arm(arm, s, rates[arm]) for s in seeds] for arm in ARMS}
    found["seeds"] = [bench.measured(bench.on_pairs("dpo", s, bench.seed_rate)) for s in seeds]
    labels = [bench.labels(s, rates["spa"]) for s in seeds]
    start = bench.measured(None)
    table = {k: {arm: own.mean(f[k] for f in rows) for arm, rows in found.items()} for k in ("gold_reward", "kl", "length")}
    by_seed = {arm: [f["gold_reward"] for f in rows] for arm, rows in found.items()}
    figures = {**table, "by_seed": by_seed, "start": start, "sweeps": choices, "labels": labels}
    notes = ["The learning rates tried were lowered once, after single runs at 3e-4 to 3e-3 in which answers grew ever longer."]
    return Outcome(checks(table["gold_reward"], start["gold_sd"], labels), figures, notes)


@dataclass
class Bench:
    """Runs of the study."""

    study: Study
    prompts: int = 600
    samples: int = 512
    seed_rate: float = SEED_RATES[1]

    @cached_property
    def base(self) -> Any:
        """The model at the start."""
        return preferencebench.sft()

    def measured(self, folder: Path | None) -> dict[str, float]:
        """Figures of a run's result, or of the model at the start."""
        return own.measured(folder, self.base, self.samples)

    def pairs(self, seed: int) -> str:
        """The 60 labelled pairs."""
        rows = preferencebench.sampled_pairs(self.base, 70, seed)[:60]
        return own.written(self.study.folder / f"seeds-{seed}.jsonl", rows)

    def on_pairs(self, objective: str, seed: int, lr: float) -> Path:
        """Three epochs of the labelled pairs."""
        return own.trained(self.study, f"{objective}-{seed}-{lr:g}", {
            "model": own.MODEL, "data": {"train": self.pairs(seed), "max_length": 64}, "objective": objective,
            **own.settings(lr, 9, 20, seed),
        })  # fmt: skip

    def run_file(self, arm: str, seed: int, lr: float) -> dict[str, Any]:
        """Two rounds from the seeded model."""
        data = own.prompts_file(self.study.folder / f"prompts-{seed}.jsonl", 2 * self.prompts, f"spa {seed}")
        limits = {"prompts": self.prompts, "max_new_tokens": preferencebench.MAX_NEW, "temperature": 0.7}
        options = {"spa-plain": {"alpha": 0.0}, "spa": {}, "spa-extrapolated": {"lam": 0.5}}
        objective: Any = {"spa": options[arm]} if arm in options else "dpo"
        source: dict[str, Any] = {"spa": limits}
        if objective == "dpo":
            judge = own.judge(self.study.folder)
            if arm == "reward-model":
                judge = {"reward-model": {"model": str(self.on_pairs("bradley-terry", seed, RM_RATE)), "device": "cpu"}}
            source = {"online-dpo": {**limits, "reward": judge}}
        return {
            "model": str(self.on_pairs("dpo", seed, self.seed_rate) / "model"), "objective": objective, "hooks": [FOLLOWED],
            "data": {"train": data, "max_length": 64, "source": source}, "reference": own.MODEL, "schedule": "constant",
            **own.settings(lr, 2 * self.prompts // BATCH, BATCH, seed),
        }  # fmt: skip

    def arm(self, arm: str, seed: int, lr: float) -> dict[str, float]:
        """Figures of one arm after two rounds."""
        return self.measured(own.trained(self.study, f"{arm}-{seed}-{lr:g}", self.run_file(arm, seed, lr)))

    def labels(self, seed: int, lr: float) -> dict[str, float]:
        """How right the labels of SPA's first round are, and whether the objective doubted them when it saw them."""
        parsed, document = config.load(self.run_file("spa", seed, lr))
        folder, watch = self.study.folder / f"watched-{seed}-{lr:g}", Watch()
        with session.open_session(parsed, document, folder, quiet=True, fresh=True, handle_signals=False) as s:
            watch.objective = s.resolved.objective.built.obj
            s.listeners.append(watch)
            s.train(keep_weights=False)
        first = own.made_rows(folder, 1)
        gap = own.gaps(first)
        flagged = np.array([watch.doubted.get(f"round-0001.jsonl:{i + 1}", False) for i in range(len(first))])
        return {
            "accuracy": own.right(gap), "doubted": own.right(gap[flagged]), "trusted": own.right(gap[~flagged]),
            "share_doubted": float(flagged.mean()),
            "longer": float(np.mean([len(r["chosen"].split()) - len(r["rejected"].split()) for r in first])),
        }  # fmt: skip


@dataclass
class Watch:
    """Which pairs the objective doubted in the step that trained on them, by id."""

    objective: Any = None
    doubted: dict[str, bool] = field(default_factory=dict)

    def on_step(self, ctx: Context) -> None:
        """The step's margins are the last ones of the window."""
        ids = [i for layout in ctx.layouts for i in layout.ids]
        low = self.objective.threshold()
        self.doubted |= {i: c < low for i, c in zip(ids, self.objective.margins[-len(ids) :], strict=True)}


def checks(reward: Mapping[str, float], sd: float, labels: list[dict[str, float]]) -> list[Check]:
    """The card's predictions with its margins."""
    gain = (reward["spa"] - reward["seeds"]) / sd
    kept = (reward["spa"] - reward["spa-plain"]) / sd
    accuracy, apart = own.mean(x["accuracy"] for x in labels), own.mean(x["trusted"] - x["doubted"] for x in labels)
    return [
        Check("gold reward of SPA over that of the seeds alone, in sd", ">= 0.3", gain, gain >= 0.3),
        Check("accuracy of the model's own labels in the first round", ">= 0.6", accuracy, accuracy >= 0.6),
        Check("label accuracy of trusted pairs over that of doubted ones", ">= 0.1", apart, apart >= 0.1),
        Check("gold reward with refinement over that without, in sd", ">= -0.05", kept, kept >= -0.05),
    ]
