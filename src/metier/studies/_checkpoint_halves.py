"""Checkpoints of a run of the preference bench, measured on two halves of held-out prompts: to choose by, and to measure on."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from metier.compare.study import Study
from metier.core import laws, log
from metier.core.runfolder import write_json
from metier.lab import preferencebench, wordpairs
from metier.studies._reward_models import at_step

STEPS, EVERY, PROMPTS = 128, 16, 96
HELD_OUT = "lab/preferences-held-out"
LABELS: dict[str, Any] = {"flip": 0.2, "length_bonus": wordpairs.LONG_BONUS}
GOLD = {"python": {"function": "metier.lab.judges:quality"}}


def curve(
    study: Study, name: str, beta: float, seed: int, steps: int, others: list[str], start: list[float]
) -> dict[str, np.ndarray]:  # fmt: skip
    """Of every checkpoint: ``kl`` and ``reward`` above the start's, both means of both halves; ``chosen_by`` and ``measured``,
    the rewards of the one half and of the other; held-out ``loss``."""
    options = {"tau": beta / 2, "average": False} if name == "ipo" else {"beta": beta}
    every = EVERY if steps == STEPS else steps // 2
    answers = {"prompts": HELD_OUT, "reward": GOLD, "max_new_tokens": preferencebench.MAX_NEW, "pairs": 1, "every": every,
               "limit": len(others), "number": 1}  # fmt: skip
    data = {
        "train": _written(study, "train", wordpairs.pairs(4000, "overoptimization", **LABELS)),
        "eval": _written(study, "held-out", wordpairs.pairs(200, "overoptimization", split="held-out", **LABELS)),
        "max_length": 128,
    }
    folder = study.folder / f"halves-{name}-{beta:g}-{seed}"
    study.train(
        {
            "model": preferencebench.MODEL, "data": data, "objective": {name: options}, "optimizer": {"adamw": {"lr": 1e-3}},
            "schedule": "constant", "hooks": [{"answers": answers}],
            "train": {"steps": steps, "batch": 32, "micro_batch": 32, "seed": seed, "eval_every": every, "save_every": every,
                      "keep": steps // every},
        }, folder.name,
    )  # fmt: skip
    found = laws.read_table(folder, wanted=("answer_kl", "answer_reward"))
    held_out = {e["step"]: e["eval_loss"] for e in log.read(folder) if e["event"] == "eval"}
    other = _other_half(folder, [int(s) for s in found["step"]], others, seed)
    one, two = found["answer_reward"] - start[0], other["gold_reward"] - start[1]
    return {"kl": (found["answer_kl"] + other["kl"]) / 2, "reward": (one + two) / 2, "chosen_by": one, "measured": two,
            "loss": np.array([held_out[int(s)] for s in found["step"]])}  # fmt: skip


def _other_half(folder: Path, steps: list[int], prompts: list[str], seed: int) -> dict[str, np.ndarray]:
    """Gold reward and KL of a run's checkpoints on prompts that its hook does not see, each answered once; kept in its folder."""
    kept = folder / "other-half.json"
    if not kept.is_file():
        base, tuned = preferencebench.sft(), preferencebench.sft()
        seen = [
            preferencebench.measure(at_step(tuned, folder, s), base, prompts, samples=len(prompts), seed=1000 + seed)
            for s in steps
        ]
        write_json(kept, {k: [x[k] for x in seen] for k in ("gold_reward", "kl")})
    return {k: np.array(v) for k, v in json.loads(kept.read_text(encoding="utf-8")).items()}


def _written(study: Study, name: str, rows: list[dict[str, Any]]) -> str:
    path = study.folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)
