"""Fair comparisons. The package itself can be called: ``metier.compare(design)`` is :func:`metier.compare.api.compare`."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Importing anything below this package binds its name in ``metier``: the package has to do what the function does."""

    def __call__(self, design: Any, *, out: str | Path | None = None, on_ray: bool = False, quiet: bool = False) -> Any:
        from metier.compare.api import compare

        return compare(design, out=out, on_ray=on_ray, quiet=quiet)


sys.modules[__name__].__class__ = _Callable
