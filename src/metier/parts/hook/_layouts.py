"""A layout as tensors by name, to be kept in a hook's state and shared between processes."""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from metier.core.engine import Engine
from metier.core.layout import Layout


def to_tensors(layout: Layout) -> dict[str, Tensor]:
    """A layout as tensors by name; of the examples' names only their number is kept."""
    made = {f.name: v for f in fields(Layout) if isinstance(v := getattr(layout, f.name), Tensor)}
    made |= {"answers": torch.tensor(layout.answers, dtype=torch.long), "ids": torch.arange(len(layout.ids))}
    return made | {f"extra.{k}": v for k, v in layout.extra.items()}


def from_tensors(made: dict[str, Tensor]) -> Layout:
    """The layout again."""
    plain: dict[str, Any] = {k: v for k, v in made.items() if "." not in k}
    plain |= {"answers": tuple(made["answers"].tolist()), "ids": tuple(map(str, made["ids"].tolist()))}
    return Layout(**plain, extra={k.partition(".")[2]: v for k, v in made.items() if "." in k})


def of_first_process(made: dict[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    """The first process's tensors on every process."""
    if engine.world == 1:
        return made
    found = {}
    for name, t in made.items():
        shape = [int(n) for n in engine.sum([n * engine.main for n in t.shape])]
        values = engine.sum(t.flatten().double().tolist() if engine.main else [0.0] * math.prod(shape))
        found[name] = torch.tensor(values, dtype=torch.float64).to(t.dtype).reshape(shape).to(t.device)
    return found
