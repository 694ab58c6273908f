"""What studies of models that learn from their own answers share: runs on the word bench, its gold reward as a judge, tuning."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core.config import PartRef
from metier.core.models import Bundle
from metier.core.trained import open_run
from metier.lab import preferencebench, words

MODEL = preferencebench.MODEL
_DONE: set[Path] = set()
JUDGE = """from metier.lab.words import lexicon


def judge(prompts, completions, answers):
    return [[lexicon(p, c) for c in own] for p, own in zip(prompts, completions)]
"""


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def prompts_file(path: Path, number: int, seed: int | str) -> str:
    """Prompts of the training split, as a file."""
    return written(path, [{"prompt": p} for p in words.prompts(number, seed)])


def judge(folder: Path, code: str = JUDGE, name: str = "gold") -> PartRef:
    """A reward part that runs ``code``; by default the bench's gold reward."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    return {"python": {"function": f"{path.resolve()}:judge"}}


def made_rows(folder: Path, round: int) -> list[dict[str, Any]]:
    """What a run's round (from 1) made."""
    text = (folder / "rounds" / f"round-{round:04d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def logged(folder: Path, name: str) -> list[float]:
    """A metric of a run's logged steps."""
    events = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [e[name] for e in events if e["event"] == "step" and name in e]


def trained(study: Study, name: str, run: Mapping[str, Any]) -> Path:
    """The folder of a finished run; one that this process has finished is not opened again."""
    folder = study.folder / name
    if folder not in _DONE:
        study.train({"schedule": "constant", **run}, name)
        _DONE.add(folder)
    return folder


def settings(lr: float, steps: int, batch: int, seed: int) -> dict[str, Any]:
    """Optimizer and length, for a run file."""
    return {
        "optimizer": {"adamw": {"lr": lr}},
        "train": {"steps": steps, "batch": batch, "seed": seed, "log_every": max(1, steps // 10)},
    }


def measured(folder: Path | None, base: Bundle, samples: int = 512) -> dict[str, float]:
    """Figures of a run's result on held-out prompts; of ``base`` itself without a folder."""
    prompts = words.prompts(128, "measured", split="held-out")
    tuned = base if folder is None else open_run(folder).bundle
    return preferencebench.measure(tuned, base, prompts, samples=samples)


def gaps(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """True difference of gold reward, chosen minus rejected, of each pair."""
    return np.array([words.lexicon(r["prompt"], r["chosen"]) - words.lexicon(r["prompt"], r["rejected"]) for r in rows])


def right(gap: np.ndarray) -> float:
    """Share of labels that are right; equal rewards count one half."""
    return float(np.mean((gap > 0) + 0.5 * (gap == 0))) if len(gap) else float("nan")


def best_of(values: Sequence[float], score: Callable[[float], float]) -> tuple[float, dict[str, float]]:
    """The value with the highest score, and all scores."""
    table = {v: score(v) for v in values}
    return max(table, key=table.__getitem__), {f"{v:g}": s for v, s in table.items()}


def mean(values: Iterable[float]) -> float:
    """Plain mean."""
    return float(np.mean(list(values)))
