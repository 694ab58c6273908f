"""The tricks and trade of training LLMs: train with them, put them to a fair test, consult them."""

import importlib
from typing import Any

_FUNCTIONS = {
    "train": "metier.core.api",
    "check": "metier.compare.check",
    "build": "metier.core.part",
}
# ``compare`` is a package that can be called.
_MODULES = (
    "adapters", "catalog", "compare", "decoders", "hooks", "laws", "merges", "model_parts", "objectives", "optimizers", "probes",
    "rewards", "schedules", "sources", "testing",
)  # fmt: skip
__all__ = [*_FUNCTIONS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"metier.{name}")
    raise AttributeError(f"module 'metier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
