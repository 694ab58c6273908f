"""What studies of models that learn from their own answers share: runs on the word bench, its gold reward as a judge, tuning.

There is one gold reward, ``words.quality``: that of labels, of judges and of what is reported. Settings are chosen on other
prompts, and with other random numbers, than those of the final figures.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core.config import PartRef
from metier.core.errors import MetierError
from metier.core.models import Bundle
from metier.core.trained import open_run
from metier.lab import preferencebench, words
from metier.studies._arms import TUNING_SEED, fresh

MODEL = preferencebench.MODEL
_DONE: set[Path] = set()
GOLD = words.quality
JUDGE = """from metier.lab.words import quality


def judge(prompts, completions, answers):
    return [[quality(p, c) for c in own] for p, own in zip(prompts, completions)]
"""


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def prompts_file(path: Path, number: int, seed: int | str) -> str:
    """Prompts of the training split, as a file."""
    return written(path, [{"prompt": p} for p in words.prompts(number, seed)])


def judge(folder: Path, code: str = JUDGE, name: str = "quality") -> PartRef:
    """A reward part that runs ``code``; by default the bench's gold reward."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    return {"python": {"function": f"{path.resolve()}:judge"}}


def made_rows(folder: Path, round: int) -> list[dict[str, Any]]:
    """What a run's round (from 1) made."""
    return read(folder / "rounds" / f"round-{round:04d}.jsonl")


def read(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def logged(folder: Path, name: str) -> list[float]:
    """A metric of a run's logged steps."""
    events = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [e[name] for e in events if e["event"] == "step" and name in e]


def trained(study: Study, name: str, run: Mapping[str, Any]) -> Path:
    """The folder of a finished run; one that this process has finished is not opened again.

    Raises ``MetierError`` when the data ended before the run's steps: arms would have had unequal budgets.
    """
    folder = study.folder / name
    if folder not in _DONE:
        done, steps = study.train({"schedule": "constant", **run}, name).step, run["train"]["steps"]
        if done < steps:
            raise MetierError(f"the run {name} ended after {done} of {steps} steps")
        _DONE.add(folder)
    return folder


def settings(lr: float, steps: int, batch: int, seed: int) -> dict[str, Any]:
    """Optimizer and length, for a run file."""
    return {
        "optimizer": {"adamw": {"lr": lr}},
        "train": {"steps": steps, "batch": batch, "seed": seed, "log_every": max(1, steps // 10)},
    }


def measured(folder: Path | None, base: Bundle, samples: int = 512, *, choosing: bool = False) -> dict[str, float]:
    """Figures of a run's result on held-out prompts; of ``base`` itself without a folder. ``choosing``: on other ones."""
    prompts = words.prompts(128, "measured", split="held-out")
    tuned = base if folder is None else open_run(folder).bundle
    asked, seed = (fresh(prompts), TUNING_SEED) if choosing else (prompts, 0)
    return preferencebench.measure(tuned, base, asked, samples=samples, seed=seed)


def gaps(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """True difference of gold reward, chosen minus rejected, of each pair."""
    return np.array([GOLD(r["prompt"], r["chosen"]) - GOLD(r["prompt"], r["rejected"]) for r in rows])


def right(gap: np.ndarray) -> float:
    """Share of labels that are right; equal rewards count one half."""
    return float(np.mean((gap > 0) + 0.5 * (gap == 0))) if len(gap) else float("nan")


def best_of(values: Sequence[float], score: Callable[[float], float]) -> tuple[float, dict[str, float]]:
    """The value with the highest score, and all scores; one without a score (nan) is never the best of several."""
    table = {v: score(v) for v in values}
    best = max(table, key=lambda v: -math.inf if math.isnan(table[v]) else table[v])
    return best, {f"{v:g}": s for v, s in table.items()}


def notes(chosen: Mapping[str, float], sweeps: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Which arms' best learning rates are at an end of their sweeps."""
    ends = []
    for arm, table in sweeps.items():
        tried = sorted(map(float, table))
        if len(tried) > 1 and chosen[arm] in (tried[0], tried[-1]):
            ends.append(f"{arm}: lr = {chosen[arm]:g} ({'smallest' if chosen[arm] == tried[0] else 'largest'})")
    return [f"The best is at an end of its sweep, so a better one may lie beyond it: {'; '.join(ends)}."] if ends else []


def mean(values: Iterable[float]) -> float:
    """Plain mean."""
    return float(np.mean(list(values)))
