"""Step times of SOAP beside pytorch_optimizer's, on the matrices of the lab's 6.9 M Llama, taking turns in one process.

python benchmarks/soap.py [--steps 40] [--threads 1] [--json]

Processor time with one thread, so that other work on the machine counts little; wall time with more.

The peer is not a dependency: ``pip install pytorch_optimizer`` in an environment of its own.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from metier.core import part
from metier.core.optim import build
from metier.lab import zoo

FREQUENCY = 10


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(zoo.config("llama-6m"))


def ours(options: dict[str, object]) -> tuple[torch.nn.Module, Callable[[], None]]:
    net = model()
    return net, build(net, part.build("optimizer", {"soap": options}), weight_decay=0.01, check_finite=False).step


def peer(limit: int) -> tuple[torch.nn.Module, Callable[[], None]]:
    try:
        from pytorch_optimizer import SOAP
    except ImportError:
        sys.exit("pytorch_optimizer is not installed here: nothing to compare with (pip install pytorch_optimizer)")
    net = model()
    optimizer = SOAP(list(net.parameters()), precondition_frequency=FREQUENCY, max_precondition_dim=limit)
    return net, optimizer.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sides = {
        "peer": peer(10000),
        "peer, vocabulary not rotated": peer(1024),
        "ours": ours({}),
        "ours, vocabulary rotated": ours({"rotate_vocabulary": True}),
        "ours, one-sided": ours({"one_sided": True}),
        "ours, all at once": ours({"spread": False}),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    clock = time.process_time if given.threads == 1 else time.perf_counter
    noise = torch.Generator().manual_seed(1)
    for _ in range(given.steps + 1):
        grads = [torch.randn(p.shape, generator=noise) for p in sides["ours"][0].parameters()]
        for name, (net, step) in sides.items():
            for p, g in zip(net.parameters(), grads, strict=True):
                p.grad = g.clone()
            began = clock()
            step()
            times[name].append(clock() - began)
    report(times, given.json)


def report(times: dict[str, list[float]], as_json: bool) -> None:
    base = median(times["peer"][1:])
    found = {
        name: {
            "first_ms": 1000 * t[0], "median_ms": 1000 * median(t[1:]), "max_ms": 1000 * max(t[1:]),
            "mean_ms": 1000 * sum(t[1:]) / (len(t) - 1),
            "median_of_peer": median(t[1:]) / base, "max_of_own_median": max(t[1:]) / median(t[1:]),
        }
        for name, t in times.items()
    }  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    for name, f in found.items():
        print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in f.items()))


if __name__ == "__main__":
    main()
