"""Trackers that get a copy of the metrics. Each is imported only when a run names it."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from metier.core.errors import UsageError, unknown


class Sink(Protocol):
    """Where events go besides the run folder. Both methods may raise; the log then goes on without it."""

    def log(self, event: dict[str, Any]) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class TensorBoard:
    """Scalars under ``train/`` and ``eval/`` in the run folder's ``tensorboard/``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, event: dict[str, Any]) -> None:
        """Send the event's numbers."""
        for name, value in scalars(event).items():
            self.writer.add_scalar(name, value, event["step"], walltime=event.get("time"))

    def close(self) -> None:
        """Send what is left and close."""
        self.writer.close()


class Wandb:
    """A Weights & Biases run named after the run folder; each start of the process is a run of one group."""

    def __init__(self, folder: Path) -> None:
        module: Any = importlib.import_module("wandb")
        self.run = module.init(project="metier", name=folder.name, group=folder.name, dir=str(folder))

    def log(self, event: dict[str, Any]) -> None:
        """Send the event's numbers."""
        values = scalars(event)
        if values:
            self.run.log(values, step=event["step"])

    def close(self) -> None:
        """Send what is left and close."""
        self.run.finish()


class Trackio:
    """A trackio run named after the run folder, in a local dashboard."""

    def __init__(self, folder: Path) -> None:
        self.module: Any = importlib.import_module("trackio")
        self.module.init(project="metier", name=folder.name)

    def log(self, event: dict[str, Any]) -> None:
        """Send the event's numbers."""
        values = scalars(event)
        if values:
            self.module.log(values, step=event["step"])

    def close(self) -> None:
        """Send what is left and close."""
        self.module.finish()


SINKS: dict[str, tuple[str, Callable[[Path], Sink]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
}


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """The numbers of a ``step`` or ``eval`` event as trackers name them: ``train/loss``, ``eval/loss``."""
    kind = {"step": "train", "eval": "eval"}.get(event.get("event", ""))
    if kind is None or event.get("step") is None:
        return {}
    out = {}
    for name, value in event.items():
        if name not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool):
            out[f"{kind}/{name.removeprefix('eval_')}"] = float(value)
    return out


def check(names: Iterable[str]) -> None:
    """Raise ``UsageError`` for a sink that is unknown or whose package is missing; imports nothing."""
    for name in names:
        if name not in SINKS:
            raise unknown("sink", name, SINKS, where="sinks")
        package = SINKS[name][0]
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"the sink {name} needs the package {package}", where="sinks", hint=f"pip install {package}")


def open_sink(name: str, folder: Path) -> Sink:
    """The sink of this name; raises whatever its package raises when it cannot start."""
    return SINKS[name][1](folder)
