"""What the benchmarks against trl share: sides in processes of their own, the same trainer settings, gradients compared."""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

MODEL = "smollm2-135m-instruct"
RANK, SKIPPED = 16, 1


def parser(doc: str, steps: int, sides: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every such benchmark; ``--side`` runs one side alone and prints its figures."""
    found = argparse.ArgumentParser(description=doc.split("\n")[0])
    found.add_argument("--json", action="store_true")
    found.add_argument("--steps", type=int, default=steps)
    found.add_argument("--side", choices=list(sides))
    return found


def side(file: str, name: str, steps: int, *more: str) -> dict:
    """The figures of one side of the benchmark ``file``, run in a process of its own so that its peak memory is its own."""
    command = [sys.executable, file, "--side", name, "--steps", str(steps), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def timed(times: list[float]) -> float:
    """Seconds from the end of the skipped steps to the end of the last."""
    return times[-1] - times[SKIPPED - 1]


def peak_bytes() -> int:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- trl -------------------------------------------------------------------------------------------------------


def settings(out: str, batch: int, steps: int, lr: float) -> dict:
    """Arguments of trl's configurations that all benchmarks share."""
    return {
        "output_dir": out, "per_device_train_batch_size": batch, "max_steps": steps, "learning_rate": lr, "report_to": [],
        "save_strategy": "no", "logging_steps": 1, "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "max_length": None, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


def lora():
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def train(trainer) -> list[float]:
    """Train; the time at the end of each step."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    trainer.add_callback(Clock)
    trainer.train()
    return times


# --- gradients -------------------------------------------------------------------------------------------------


def trl_gradients(trainer, batch) -> tuple[dict, dict]:
    """Values and gradients of trl's adapter on one batch, by PEFT's names; B is random, else A would have no gradient."""
    import torch
    from peft import get_peft_model_state_dict

    torch.manual_seed(1)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    start = {k.replace("base_model.model.", ""): v.clone() for k, v in get_peft_model_state_dict(trainer.model).items()}
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch).backward()
    theirs = {
        n.replace("base_model.model.", "").replace(".default", ""): p.grad
        for n, p in trainer.model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    return start, theirs


def difference(start: Mapping[str, Any], theirs: Mapping[str, Any], items: list, objective: str) -> float:
    """Largest relative difference of the gradients ``theirs`` from those of metier at the same values on the same items."""
    import torch

    from metier.core import part
    from metier.core.adapt import attach
    from metier.core.data.collate import collate
    from metier.core.lossmodule import LossModule
    from metier.core.models import load
    from metier.core.scores import reference_scorer

    attached = attach(load(MODEL).model, part.build("adapter", {"lora": {"rank": RANK}}))
    names = {f"{name}.{suffix}": getattr(a, own) for name, a in attached.adapters.items() for own, suffix in a.peft_names.items()}
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(start[name])
    built = part.build("objective", objective)
    reference = reference_scorer(attached.model, attached.disabled) if "reference" in built.needs else None
    total, units, _ = LossModule(attached.model, built, reference)(collate(items, pad_id=0))
    (total / units).backward()
    return max(((p.grad - theirs[n]).norm() / theirs[n].norm()).item() for n, p in names.items())
