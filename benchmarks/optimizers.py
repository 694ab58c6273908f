"""What a step of every optimizer costs on a 6.85 M Llama: time against torch's AdamW and against forward + backward, and state.

Each optimizer gets its own copy of the weights and the same gradients; rounds are interleaved, so that a busy moment hits all
alike. `foreach` and `fused` are torch's own AdamW. The table in the documentation is made from the file that --save writes.

    python benchmarks/optimizers.py [--only NAME …] [--json] [--save]
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median

import torch

from metier.core import models, part
from metier.core.optim import build

ROUNDS, STEPS, SKIPPED = 6, 12, 2
BATCH = (8, 256)
SAVED = Path(__file__).with_suffix(".json")


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of a batch of random tokens: every entry is set, as in training."""
    ids = torch.randint(0, 2048, BATCH, generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [g for g in found if g is not None]


def forward_backward(model: torch.nn.Module, rounds: int = 8) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        gradients(model)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def contenders(model: torch.nn.Module, names: list[str]) -> dict:
    """Name -> (weights, optimizer)."""
    made = {}
    for name, options in (("foreach", {"foreach": True}), ("fused", {"fused": True})):
        own = copy.deepcopy(model)
        made[name] = own, torch.optim.AdamW(own.parameters(), lr=1e-4, weight_decay=0.1, **options)
    for name in names:
        own = copy.deepcopy(model)
        built = part.build("optimizer", name)
        optimizer = build(own, built, lr=1e-4, weight_decay=0.1, check_finite=False)
        optimizer.observe(loss=3.0, progress=0.5)
        optimizer.sampler = lambda own=own: (2048, {id(p): p.grad for p in own.parameters()})
        made[name] = own, optimizer
    return made


def times(weights: torch.nn.Module, optimizer: torch.optim.Optimizer, grads: list[torch.Tensor], steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        for p, g in zip(weights.parameters(), grads, strict=True):
            p.grad = g
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    optimizer.zero_grad(set_to_none=True)
    return seconds


def measure(names: list[str]) -> dict:
    model = models.load("lab/llama-6m").model.train()
    grads, whole = gradients(model), forward_backward(model)
    entries = sum(p.numel() for p in model.parameters())
    found = contenders(model, names)
    first = {n: times(w, o, grads, SKIPPED) for n, (w, o) in found.items()}
    seconds: dict[str, list[float]] = {n: [] for n in found}
    for _ in range(ROUNDS):
        for name, (weights, optimizer) in found.items():
            seconds[name] += times(weights, optimizer, grads, STEPS)
    base = median(seconds["foreach"])
    rows = {}
    for name, (_, optimizer) in found.items():
        size = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
        middle = median(seconds[name])
        rows[name] = {
            "ms": 1000 * middle, "against_foreach": middle / base, "of_forward_backward": middle / whole,
            "worst_over_median": max(seconds[name]) / middle, "first_ms": 1000 * first[name][0],
            "state_bytes_per_parameter": size / entries,
        }  # fmt: skip
    return {
        "model": "lab/llama-6m",
        "parameters": entries,
        "forward_backward_ms": 1000 * whole,
        "batch": list(BATCH),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}, from which the documentation is made")
    given = parser.parse_args()
    known = [i.name for i in part.listing() if i.kind == "optimizer" and not hasattr(part.load(i.id), "step")]
    found = measure([n for n in known if not given.only or n in given.only])
    if given.save:
        SAVED.write_text(json.dumps(found, indent=1) + "\n")
    if given.json:
        print(json.dumps(found))
        return
    print(f"forward + backward: {found['forward_backward_ms']:.0f} ms, {found['parameters'] / 1e6:.2f} M parameters")
    for name, r in sorted(found["rows"].items(), key=lambda item: item[1]["ms"]):
        print(
            f"{name:16} {r['ms']:8.1f} ms  {r['against_foreach']:6.2f}x foreach AdamW  {r['of_forward_backward']:6.1%} of fwd+bwd"
            f"  worst/median {r['worst_over_median']:5.2f}  first {r['first_ms']:7.0f} ms"
            f"  state {r['state_bytes_per_parameter']:.2f} B/param"
        )
    print("ratios to foreach AdamW: " + ", ".join(f"{n} {r['against_foreach']:.2f}" for n, r in found["rows"].items()))


if __name__ == "__main__":
    main()
