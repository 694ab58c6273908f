"""Arms on the preference bench: each tuned over equally many settings, then trained with fresh seeds.

    bench = Arms(study, {"clean": rows, "flipped": others}, steps=120, tuning=60)
    dpo = bench.tuned(tries([{"dpo": {}}], LRS, data="flipped"))    # one run a setting, the best one then with three seeds
    sft = bench.tuned(tries(["nll"], LRS))
    gain, error = gap(dpo, sft, unit=bench.sd)                      # paired by seed, in sd of the fine-tuned model's answers
    bench.report(dpo=dpo, sft=sft), bench.notes(dpo=dpo, sft=sft)   # for the finding

Tuning runs have a seed of their own and ``tuning`` steps; the setting with the best ``choose`` wins, among those with a KL of at
most ``most_kl``. They are measured on ``tuning_prompts`` only, none of which occurs in what the final figures are of, with
another sampling seed. Final figures are those of ``metier.lab.preferencebench`` on ``prompts`` and ``held_out``, and of
``more``. Each run's figures are kept in ``arms/`` of the study's folder under a hash of its settings, its data and what it is
measured on, so an interrupted study goes on; its weights are thrown away unless asked for. A run that becomes non-finite has no
figures (nan): it is never chosen, and no check holds with it. ``notes`` names every tried number whose best is at an end of its
sweep. With ``study.quick`` there are 2 steps, one seed, and the first setting only.
"""

import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metier.compare.study import Study
from metier.core.config import PartRef
from metier.core.runfolder import write_json

LRS = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 100
"""Of the runs, and of sampling, by which a setting is chosen; final figures are sampled with seed 0."""
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
    def ends(self) -> list[str]:
        """Numbers of the chosen setting that are the smallest or largest of several tried: ``dpo.beta = 0.03 (smallest)``."""
        tried = [_numbers({"lr": t["lr"], "": t["objective"]}) for t in self.tried]
        found = []
        for name, value in _numbers({"lr": self.chosen.lr, "": self.chosen.objective}).items():
            values = {t[name] for t in tried if name in t}
            if len(values) > 1 and value in (min(values), max(values)):
                found.append(f"{name} = {value:g} ({'smallest' if value == min(values) else 'largest'})")
        return found


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
    """The higher the better; a figure of ``preferencebench.measure``."""
    most_kl: float = math.inf
    prompts: Sequence[str] | None = None
    """``None``: the bench's own 128; so too ``held_out``, its own 1000 pairs."""
    tuning_prompts: Sequence[str] | None = None
    """``None``: as many others of the held-out split. ``ValueError`` when one is in ``prompts`` or ``held_out``."""
    held_out: Rows | None = None
    samples: int = 512
    more: More | None = None

    def __post_init__(self) -> None:
        from metier.lab import wordpairs, words

        held_out = wordpairs.pairs(1000, "measured", split="held-out") if self.held_out is None else self.held_out
        prompts = words.prompts(128, "measured", split="held-out") if self.prompts is None else self.prompts
        tuning = fresh(prompts, held_out) if self.tuning_prompts is None else self.tuning_prompts
        if both := set(tuning) & _asked(prompts, held_out):
            raise ValueError(f"{len(both)} prompts for choosing are also those of the final figures")
        if self.study.quick:
            self.steps, self.tuning, self.seeds, self.samples = 2, 2, 1, 8
            self.data = {name: rows[:16] for name, rows in self.data.items()}
            held_out, prompts, tuning = held_out[:8], prompts[:8], tuning[:8]
        self.held_out, self.prompts, self.tuning_prompts = list(held_out), list(prompts), list(tuning)
        more = [inspect.getsource(self.more)] if self.more else []
        self._final = _hash([self.held_out, self.prompts, self.samples, *more])
        self._chosen_on = _hash(["tuning", self.tuning_prompts, TUNING_SEED, self.samples])
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

    def tuned(self, settings: Sequence[Try], then: Callable[[Try], Sequence[Try]] | None = None) -> Arm:
        """The best of the settings, with every seed; ``then`` names further ones to try, given the best so far."""
        settings = list(settings[:1] if self.study.quick else settings)
        if len(settings) == 1:
            only = {"objective": settings[0].objective, "lr": settings[0].lr, "value": math.nan, "kl": math.nan}
            return self.fixed(settings[0], [only])
        tried = [self._try(t) for t in settings]
        if then:
            further = then(settings[self._best(tried)])
            settings, tried = [*settings, *further], [*tried, *(self._try(t) for t in further)]
        return self.fixed(settings[self._best(tried)], tried)

    def fixed(self, setting: Try, tried: Sequence[Mapping[str, Any]] = ()) -> Arm:
        """A setting with every seed."""
        return Arm(setting, [self.figures(setting, seed, self.steps) for seed in range(self.seeds)], tried)

    def figures(self, setting: Try, seed: int, steps: int, *, choosing: bool = False) -> Figures:
        """Final figures of one run, or those by which to choose; read back when there are any."""
        name = self._name(setting, seed, steps, self._chosen_on if choosing else self._final)
        kept = self.study.folder / "arms" / f"{name}.json"
        if kept.is_file():
            return {k: math.nan if v is None else v for k, v in json.loads(kept.read_text())["figures"].items()}
        found = self._measured(setting, seed, steps, name, choosing)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"setting": setting.__dict__, "seed": seed, "steps": steps, "figures": found})  # nan as null
        shutil.rmtree(self.study.folder / "runs" / name, ignore_errors=True)
        return found

    def weights(self, setting: Try, seed: int, steps: int) -> Path:
        """Folder of the trained model, which is kept."""
        steps = self.tuning if self.study.quick else steps
        name = self._name(setting, seed, steps, "") + "-kept"
        if not (self.study.folder / "runs" / name / "model").is_dir():
            self._trained(setting, seed, steps, name)
        return self.study.folder / "runs" / name / "model"

    def _try(self, setting: Try) -> dict[str, Any]:
        """A setting with the figures it is judged by."""
        found = self.figures(setting, TUNING_SEED, self.tuning, choosing=True)
        value, kl = (found.get(key, math.nan) for key in (self.choose, "kl"))
        return {"objective": setting.objective, "lr": setting.lr, "value": value, "kl": kl}

    def _best(self, tried: Sequence[Mapping[str, Any]]) -> int:
        return max(range(len(tried)), key=lambda i: self._rank(tried[i]))

    def _rank(self, tried: Mapping[str, Any]) -> tuple[bool, float]:
        """Allowed settings first, then by value; when none is allowed, by the smallest KL."""
        value, kl = (v if math.isfinite(v) else bad for v, bad in ((tried["value"], -math.inf), (tried["kl"], math.inf)))
        allowed = kl <= self.most_kl
        return allowed, value if allowed else -kl

    def _name(self, setting: Try, seed: int, steps: int, measured: str) -> str:
        objective = setting.objective if isinstance(setting.objective, str) else next(iter(setting.objective))
        known = [setting.__dict__, self._content[setting.data], measured, seed, steps]
        return f"{objective}-{setting.data}-{seed}-{_hash(known)}"

    def _trained(self, setting: Try, seed: int, steps: int, name: str) -> tuple[Any, Figures]:
        """The tuned model, and what training says of it; nearly nothing is measured yet."""
        from metier.lab import preferencebench as lab

        assert self.prompts is not None
        options = {**setting.options, **({"batch": 8} if self.study.quick else {})}
        return lab.train(
            setting.objective, self._path(setting.data), lr=setting.lr, steps=steps, seed=seed,
            folder=self.study.folder / "runs" / name, prompts=self.prompts[:1], held_out=[], samples=1, **options,
        )  # fmt: skip

    def _measured(self, setting: Try, seed: int, steps: int, name: str, choosing: bool) -> Figures:
        from metier.core.guards import NonFiniteError
        from metier.lab import preferencebench as lab

        try:
            bundle, told = self._trained(setting, seed, steps, name)
        except NonFiniteError:
            return {"gold_reward": math.nan, "kl": math.nan}
        base, prompts = lab.sft(), self.tuning_prompts if choosing else self.prompts
        assert prompts is not None
        found = lab.measure(bundle, base, prompts, samples=self.samples, seed=TUNING_SEED if choosing else 0)
        if not choosing:
            found |= lab.measure_pairs(bundle, base, self.held_out) if self.held_out else {}
            found |= self.more(bundle, base) if self.more else {}
        return found | {k: told[k] for k in ("loss", "steps")}

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
        ends = [f"{name}: {', '.join(a.ends)}" for name, a in arms.items() if a.ends]
        return [f"The best is at an end of its sweep, so a better one may lie beyond it: {'; '.join(ends)}."] if ends else []


def fresh(prompts: Sequence[str], held_out: Rows = (), split: Literal["held-out", "shifted"] = "held-out") -> list[str]:
    """As many different prompts of a split as ``prompts`` has, at most 128, none of which is there or in ``held_out``."""
    from metier.lab import words

    taken, number = _asked(prompts, held_out), min(len(prompts), 128)
    return [p for p in dict.fromkeys(words.prompts(16 * number, "tuning", split=split)) if p not in taken][:number]


def _asked(prompts: Sequence[str], held_out: Rows) -> set[str]:
    return {*prompts, *(r["prompt"] for r in held_out)}


def _numbers(value: Any, name: str = "") -> dict[str, float]:
    """The numbers in an objective with their places: ``{"combined.weights.1": 0.1}``."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {k: v for key, inner in items for k, v in _numbers(inner, f"{name}.{key}".strip(".")).items()}
    return {name: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()[:12]
