"""What metier's loop costs over a bare PyTorch loop on the same model, data shape and optimizer.

Both train a lab Llama from scratch on blocks of real text with fused AdamW and clipping, alternating in short rounds in one
process; the figure is the ratio of the median step times (metier's between two log lines, so logging and data are in it).

    python benchmarks/loop_overhead.py [--json]
"""

import argparse
import json
import tempfile
import time
from itertools import pairwise
from statistics import median

import torch

from metier import train
from metier.core import models
from metier.core.data.rows import open_rows

ROUNDS, STEPS, SKIPPED = 4, 12, 2
SETTINGS = {"lab/llama-6m": (8, 256), "lab/llama-1m": (8, 256)}


def batches(tokenizer, batch: int, length: int, number: int) -> list[torch.Tensor]:
    ids: list[int] = []
    for row in open_rows("lab/python", limit=120):
        ids += tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        if len(ids) > batch * length * number:
            break
    return list(torch.tensor(ids[: batch * length * number]).view(number, batch, length))


def bare(name: str, batch: int, length: int) -> list[float]:
    bundle = models.load(name)
    model, data = bundle.model.train(), batches(bundle.tokenizer, batch, length, STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    seconds = []
    for ids in data:
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds[SKIPPED:]


def metier(name: str, batch: int, length: int) -> list[float]:
    run = {
        "model": name, "data": {"train": "lab/python", "limit": 120, "chunk": True, "max_length": length},
        "optimizer": {"adamw": {"lr": 1e-3, "weight_decay": 0.1}}, "schedule": "constant",
        "train": {"steps": STEPS, "batch": batch, "micro_batch": batch},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        events = train(run, out=folder, quiet=True, keep_weights=False).events
    times = [e["time"] for e in events if e["event"] == "step"]
    return [b - a for a, b in pairwise(times)][SKIPPED - 1 :]


def measure(name: str) -> dict:
    batch, length = SETTINGS[name]
    plain, ours = [], []
    for _ in range(ROUNDS):
        plain += bare(name, batch, length)
        ours += metier(name, batch, length)
    parameters = sum(p.numel() for p in models.load(name).model.parameters())
    return {
        "model": name, "parameters": parameters, "batch": [batch, length],
        "bare_ms": 1000 * median(plain), "metier_ms": 1000 * median(ours), "overhead": median(ours) / median(plain) - 1,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = [measure(name) for name in SETTINGS]
    if given.json:
        print(json.dumps(found))
        return
    for f in found:
        print(f"{f['model']} ({f['parameters'] / 1e6:.2f} M): bare {f['bare_ms']:.0f} ms, metier {f['metier_ms']:.0f} ms a step")
    print("overhead: " + ", ".join(f"{f['model']} {f['overhead']:+.1%}" for f in found))


if __name__ == "__main__":
    main()
