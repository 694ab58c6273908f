"""A reward of one's own: a function in a Python file."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from metier.core.errors import UsageError, unknown
from metier.core.part import part


@part("reward/python", paper="-")
class Python:
    """What a function says, named by ``function: path/to/file.py:name`` or ``package.module:name``.

    It is called as ``name(prompts, completions, answers)``, as every reward is (``prompts: list[str]``, ``completions:
    list[list[str]]``, ``answers: list[str] | None``), and returns ``[P, K]`` as a tensor, an array or nested lists; rows with
    fewer completions may be shorter. The file is run when the reward is built, as an import would. Raises ``UsageError`` for a
    file or name that is not there, and for results of another shape or without a finite number for a completion (``None`` and
    NaN stand for "no rating" with ``allow_missing: true`` and give NaN).
    """

    example: ClassVar = {"function": f"{Path(__file__).with_name('length.py')}:length"}

    def __init__(self, *, function: str, allow_missing: bool = False) -> None:
        self.name, self.allow_missing = function, allow_missing
        self.function = _loaded(function)

    def __call__(self, prompts: list[str], completions: list[list[str]], answers: list[str] | None) -> Tensor:
        """``[P, K]`` float32; missing completions of shorter rows get 0."""
        found = self.function(prompts, completions, answers)
        if isinstance(found, Tensor):
            found = found.detach().cpu()
        rewards = torch.zeros(len(prompts), max(map(len, completions), default=0))
        if len(found) != len(prompts):
            raise UsageError(f"{self.name} gave rewards of {len(found)} prompts instead of {len(prompts)}")
        for i, (row, written) in enumerate(zip(found, completions, strict=True)):
            if len(row) not in (len(written), rewards.shape[1]):
                raise UsageError(f"{self.name} gave {len(row)} rewards for {len(written)} completions of prompt {i}")
            for k in range(len(written)):
                rewards[i, k] = self._number(row[k], i, k)
        return rewards

    def _number(self, value: Any, i: int, k: int) -> float:
        try:
            number = float("nan") if value is None else float(value)
        except (TypeError, ValueError):
            raise UsageError(f"{self.name} gave {value!r} for completion {k} of prompt {i}, expected a number") from None
        missing = number != number
        if abs(number) == float("inf") or (missing and not self.allow_missing):
            raise UsageError(
                f"{self.name} gave {value} for completion {k} of prompt {i}",
                hint="Say allow_missing: true when a rating may be missing." if missing else None,
            )
        return number


def _loaded(function: str) -> Callable[..., Any]:
    """The function named by ``file.py:name`` or ``package.module:name``."""
    file, _, name = function.rpartition(":")
    path = Path(file).expanduser()
    where = "reward/python, option function"
    if not file or not name.isidentifier():
        raise UsageError(f"{function!r} is not of the form file.py:name", where=where)
    module = "/" not in file and path.suffix != ".py" and importlib.util.find_spec(file.partition(".")[0]) is not None
    if not module and (path.suffix != ".py" or not path.is_file()):
        raise UsageError(f"no Python file {file}", where=where, hint=f"Looked from {Path.cwd()}.")
    try:
        found = importlib.import_module(file) if module else _run(path)
    except Exception as e:
        raise UsageError(f"{file} cannot be imported: {type(e).__name__}: {e}", where=where) from e
    return _named(found, file, name, where)


def _run(path: Path) -> Any:
    """The module that a file makes."""
    spec = importlib.util.spec_from_file_location(f"metier_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _named(module: Any, file: str, name: str, where: str) -> Callable[..., Any]:
    if not callable(getattr(module, name, None)):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        raise unknown(f"function of {file}", name, own, where=where)
    return getattr(module, name)
