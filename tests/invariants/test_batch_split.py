"""P12, F23: the same effective batch gives the same update however it is split: the whole path of ``metier train`` in float64.

Bugs it is meant to catch: a mean over micro-batches instead of over loss units, padding or a neighbour that is seen, a
checkpointed block that computes something else, threads that change the order, metrics averaged over micro-batches.
"""

import json

import numpy as np
import pytest
import torch

from metier.core import config, session
from metier.core.engine import Engine

STEPS, BATCH = 5, 12
WALL = ("seconds", "elapsed", "tokens_per_second", "memory")
WAYS = {
    "3 x 4": {"train": {"micro_batch": 4}},
    "12 x 1": {"train": {"micro_batch": 1}},
    "by tokens": {"train": {"micro_batch": None}},
    "packed": {"data": {"packed": True}},
    "packed, 3 x 4": {"data": {"packed": True}, "train": {"micro_batch": 4}},
    "checkpointing": {"train": {"gradient_checkpointing": True, "micro_batch": 4}},
    "checkpointing, packed": {"train": {"gradient_checkpointing": True}, "data": {"packed": True}},
    "workers": {"train": {"workers": 2, "micro_batch": 4}},
}


class Trace:
    """Parameters and metrics after every step."""

    def __init__(self):
        self.params, self.metrics = [], []

    def on_step(self, ctx):
        self.params.append(torch.cat([p.detach().reshape(-1).clone() for _, p in ctx.trainable()]))
        self.metrics.append({k: v for k, v in ctx.metrics.items() if k not in WALL})


def trained(run, folder, way):
    settings = {**run, **{k: {**run[k], **v} for k, v in way.items()}}
    parsed, document = config.load(settings)
    trace = Trace()
    with session.open_session(parsed, document, folder, quiet=True, handle_signals=False) as s:
        assert next(s.context.model.parameters()).dtype == torch.float64
        for m in s.context.model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0  # which masks are drawn does depend on the split
        s.listeners.append(trace)
        s.train(keep_weights=False)
    assert len(trace.params) == STEPS
    return trace


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Weights of the model, and of a reference model, in float64."""
    monkeypatch.setattr(session, "_dtype", lambda name: torch.float64)

    def grad_norm(self, params):
        return torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()  # the engine's is in float32

    monkeypatch.setattr(Engine, "grad_norm", grad_norm)


def words(rng, n):
    return " ".join(rng.choice(["alpha", "beta", "gamma", "delta", "for", "in", "x"], n))


def rows(kind):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(40):
        prompt, a, b = (words(rng, n) for n in rng.integers(1, 9, 3))
        made.append({
            "completions": {"prompt": prompt, "completion": a},
            "pairs": {"prompt": prompt, "chosen": a, "rejected": b + "."},
            "classes": {"text": a, "label": int(rng.integers(3))},
        }[kind])  # fmt: skip
    return made


ROWS = [name for name, way in WAYS.items() if "data" not in way]
FEW = ["12 x 1", "packed, 3 x 4", "checkpointing, packed"]
CASES = {
    "lm, llama": ("lab/llama-50k", "lm", "completions", list(WAYS)),
    "lm, gpt2": ("lab/gpt2-1m", "lm", "completions", FEW),
    "dpo, llama": ("lab/llama-50k", {"dpo": {"beta": 0.5}}, "pairs", list(WAYS)),
    "dpo, gpt2": ("lab/gpt2-1m", {"dpo": {"beta": 0.5}}, "pairs", FEW[:2]),
    "kto, of all rows at once": ("lab/llama-50k", "kto", "pairs", FEW),
    "aot, sorted": ("lab/llama-50k", {"aot": {"beta": 0.5}}, "pairs", FEW),
    "beta-dpo, with a state": ("lab/llama-50k", {"beta-dpo": {"beta": 0.5}}, "pairs", FEW),
    "ld-dpo, by tokens": ("lab/llama-50k", {"ld-dpo": {"beta": 0.5}}, "pairs", FEW[:2]),
    "pl-dpo": ("lab/llama-50k", "pl-dpo", "pairs", FEW[:2]),
    "classify, bert": ("lab/bert-1m", "classify", "classes", ROWS),
    "classify, llama": ("lab/llama-50k", "classify", "classes", ROWS),
}


def run_file(tmp_path, case):
    model, objective, kind, _ = CASES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows(kind)), encoding="utf-8")
    return {
        "model": model, "objective": objective, "data": {"train": str(path), "max_length": 120},
        "optimizer": {"adamw": {"lr": 1e-3}}, "schedule": "constant",
        "train": {"steps": STEPS, "batch": BATCH, "micro_batch": BATCH, "seed": 3},
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_trajectory(tmp_path, case):
    run = run_file(tmp_path, case)
    whole = trained(run, tmp_path / "whole", {})
    assert (whole.params[-1] - whole.params[0]).abs().mean() > 1e-4  # it does train
    for name in CASES[case][3]:
        split = trained(run, tmp_path / name, WAYS[name])
        for a, b in zip(whole.params, split.params, strict=True):
            # Promised is 1e-7. Rows of another width may be computed by segments or under a mask: the same sums in another
            # order, which Adam enlarges where gradients are nearly zero (1e-9 seen; 1e-12 while all had a mask).
            assert (a - b).abs().mean() < 1e-8, name
        for a, b in zip(whole.metrics, split.metrics, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6), name
