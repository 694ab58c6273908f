"""Arms on the preference bench: each tuned over equally many settings, then trained with fresh seeds.

    bench = Arms(study, {"clean": rows, "flipped": others}, steps=120, tuning=60)
    dpo = bench.tuned(tries([{"dpo": {}}], LRS, data="flipped"))    # one run a setting, the best one then with three seeds
    sft = bench.tuned(tries(["nll"], LRS))
    gain, error = gap(dpo, sft, unit=bench.sd)                      # paired by seed, in sd of the fine-tuned model's answers
    bench.report(dpo=dpo, sft=sft), bench.notes(dpo=dpo, sft=sft)   # for the finding

Tuning runs have a seed of their own and ``tuning`` steps; the setting with the best ``choose`` wins, among those with a KL of at
most ``most_kl``. Figures are those of ``metier.lab.preferencebench`` on ``prompts`` and ``held_out``, and of ``more``. Each
run's figures are kept in ``arms/`` of the study's folder under a hash of its settings and data, so an interrupted study goes
on; its weights are thrown away unless asked for. A run that becomes non-finite has no figures (nan): it is never chosen, and
no check holds with it. With ``study.quick`` there are 2 steps, one seed, and the first setting only.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core.config import PartRef
from metier.core.runfolder import write_json

LRS = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 100
Figures = dict[str, float]
Rows = Sequence[Mapping[str, Any]]
More = Callable[[Any, Any], Mapping[str, float]]
"""``(tuned bundle, bundle of the start) -> further figures``."""


@dataclass(frozen=True)
class Try:
    """One setting."""

    objective: PartRef
    lr: float = 1e-3
    data: str = "clean"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``preferencebench.train``: ``batch``, ``reference``, ``overrides``."""


def size(study: Study, number: int) -> int:
    """How many rows to make."""
    return 16 if study.quick else number


def tries(objectives: Sequence[PartRef], lrs: Sequence[float] = LRS, data: str = "clean", **options: Any) -> list[Try]:
    """Every objective with every learning rate."""
    return [Try(o, lr, data, options) for o in objectives for lr in lrs]


@dataclass(frozen=True)
class Arm:
    """A setting and its runs."""

    chosen: Try
    runs: Sequence[Figures]
    """One a seed."""
    tried: Sequence[Mapping[str, Any]] = ()
    """``{"objective", "lr", "value", "kl"}`` of each setting."""

    def values(self, key: str = "gold_reward") -> np.ndarray:
        """A figure of every seed; nan where it is missing."""
        return np.array([r.get(key, math.nan) for r in self.runs], float)

    def mean(self, key: str = "gold_reward") -> float:
        """Its mean over the seeds."""
        return float(self.values(key).mean())

    @property
    def at_edge(self) -> bool:
        """Whether the chosen learning rate is the smallest or largest of several."""
        lrs = {t["lr"] for t in self.tried}
        return len(lrs) > 1 and self.chosen.lr in (min(lrs), max(lrs))


def gap(a: Arm, b: Arm, key: str = "gold_reward", unit: float = 1.0) -> tuple[float, float]:
    """Mean of ``a - b`` over the seeds and its standard error (nan with one seed), in units of ``unit``."""
    d = (a.values(key) - b.values(key)) / unit
    return float(d.mean()), float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan


@dataclass
class Arms:
    """What all arms of a study have in common."""

    study: Study
    data: Mapping[str, Rows]
    steps: int = 100
    tuning: int = 50
    seeds: int = 3
    choose: str = "gold_reward"
    """The higher the better."""
    most_kl: float = math.inf
    prompts: Sequence[str] | None = None
    """``None``: the bench's own 128; so too ``held_out``, its own 1000 pairs."""
    held_out: Rows | None = None
    samples: int = 512
    more: More | None = None

    def __post_init__(self) -> None:
        from metier.lab import wordpairs, words

        held_out = wordpairs.pairs(1000, "measured", split="held-out") if self.held_out is None else self.held_out
        prompts = words.prompts(128, "measured", split="held-out") if self.prompts is None else self.prompts
        if self.study.quick:
            self.steps, self.tuning, self.seeds, self.samples = 2, 2, 1, 8
            self.data = {name: rows[:16] for name, rows in self.data.items()}
            held_out, prompts = held_out[:8], prompts[:8]
        self.held_out, self.prompts = list(held_out), list(prompts)
        self._measured = _hash([self.held_out, self.prompts, self.samples])
        self._content = {name: _hash(rows) for name, rows in self.data.items()}

    @cached_property
    def base(self) -> Figures:
        """Figures of the fine-tuned model."""
        from metier.lab import preferencebench as lab

        assert self.prompts is not None
        return lab.measure(lab.sft(), None, self.prompts, samples=self.samples)

    @property
    def sd(self) -> float:
        """Standard deviation of the gold reward over the fine-tuned model's answers: the unit of rewards."""
        return self.base["gold_sd"]

    def tuned(self, settings: Sequence[Try]) -> Arm:
        """The best of the settings, with every seed."""
        settings = settings[:1] if self.study.quick else settings
        found = [self.figures(t, TUNING_SEED, self.tuning) for t in settings] if len(settings) > 1 else [{}]
        tried = [
            {"objective": t.objective, "lr": t.lr, "value": f.get(self.choose, math.nan), "kl": f.get("kl", math.nan)}
            for t, f in zip(settings, found, strict=True)
        ]
        return self.fixed(settings[max(range(len(tried)), key=lambda i: self._rank(tried[i]))], tried)

    def fixed(self, setting: Try, tried: Sequence[Mapping[str, Any]] = ()) -> Arm:
        """A setting with every seed."""
        return Arm(setting, [self.figures(setting, seed, self.steps) for seed in range(self.seeds)], tried)

    def figures(self, setting: Try, seed: int, steps: int) -> Figures:
        """Figures of one run, read back when there are any."""
        name = self._name(setting, seed, steps)
        kept = self.study.folder / "arms" / f"{name}.json"
        if kept.is_file():
            return {k: math.nan if v is None else v for k, v in json.loads(kept.read_text())["figures"].items()}
        found = self._trained(setting, seed, steps, name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"setting": setting.__dict__, "seed": seed, "steps": steps, "figures": found})  # nan as null
        shutil.rmtree(self.study.folder / "runs" / name, ignore_errors=True)
        return found

    def weights(self, setting: Try, seed: int, steps: int) -> Path:
        """Folder of the trained model, which is kept."""
        name = self._name(setting, seed, self.tuning if self.study.quick else steps) + "-kept"
        if not (self.study.folder / "runs" / name / "model").is_dir():
            self._trained(setting, seed, self.tuning if self.study.quick else steps, name)
        return self.study.folder / "runs" / name / "model"

    def _rank(self, tried: Mapping[str, Any]) -> tuple[bool, float]:
        """Allowed settings first, then by value; when none is allowed, by the smallest KL."""
        value, kl = (v if math.isfinite(v) else bad for v, bad in ((tried["value"], -math.inf), (tried["kl"], math.inf)))
        allowed = kl <= self.most_kl
        return allowed, value if allowed else -kl

    def _name(self, setting: Try, seed: int, steps: int) -> str:
        objective = setting.objective if isinstance(setting.objective, str) else next(iter(setting.objective))
        known = [setting.__dict__, self._content[setting.data], self._measured, seed, steps]
        return f"{objective}-{setting.data}-{seed}-{_hash(known)}"

    def _trained(self, setting: Try, seed: int, steps: int, name: str) -> Figures:
        from metier.core.guards import NonFiniteError
        from metier.lab import preferencebench as lab

        rows = self._path(setting.data)
        options = {**setting.options, **({"batch": 8} if self.study.quick else {})}
        try:
            bundle, found = lab.train(
                setting.objective, rows, lr=setting.lr, steps=steps, seed=seed, folder=self.study.folder / "runs" / name,
                prompts=self.prompts, held_out=self.held_out, samples=self.samples, **options,
            )  # fmt: skip
        except NonFiniteError:
            return {"gold_reward": math.nan, "kl": math.nan}
        return found | (dict(self.more(bundle, lab.sft())) if self.more else {})

    def _path(self, name: str) -> str:
        """The file of some rows, written when it is not there."""
        path = self.study.folder / "data" / f"{name}-{self._content[name]}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(r) + "\n" for r in self.data[name]), encoding="utf-8")
        return str(path)

    # --- for the finding ---------------------------------------------------------------------------------------------

    def report(self, **arms: Arm) -> dict[str, Any]:
        """Chosen settings, what was tried, and every run."""
        told = {
            name: {
                "objective": a.chosen.objective, "lr": a.chosen.lr, "data": a.chosen.data, "tried": list(a.tried),
                "means": {k: a.mean(k) for k in a.runs[0]}, "runs": list(a.runs),
            }
            for name, a in arms.items()
        }  # fmt: skip
        return {"sft": self.base, "arms": told}

    def notes(self, **arms: Arm) -> list[str]:
        """What a reader should doubt."""
        edge = [name for name, a in arms.items() if a.at_edge]
        return [f"The best learning rate is at an end of the sweep for {', '.join(edge)}."] if edge else []


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()[:12]
