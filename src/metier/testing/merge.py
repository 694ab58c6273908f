"""Contract of merges: what the streaming writer relies on, for any method."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metier.core import part
from metier.core.merging import merge_one
from metier.core.part import Built

OPTIONS: dict[str, Mapping[str, Any]] = {}
"""Options for parts that cannot be made without any."""
SHAPES = ((7, 5), (6,), (2, 3, 4), (1, 1))


def tensors(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """``count`` fine-tuned tensors near a base, and the base."""
    g = torch.Generator().manual_seed(count)
    base = torch.randn(shape, generator=g)
    return [(base + 0.1 * torch.randn(shape, generator=g)).to(dtype) for _ in range(count)], base.to(dtype)


def check(ref: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Run the contract on the part ``ref``. Returns the names of the checks; raises ``AssertionError``."""
    chosen = OPTIONS.get(ref, {}) if options is None else options
    built = part.build("merge", {ref.split("/")[1]: dict(chosen)})
    for test in CHECKS:
        test(built)
    return [t.__name__.removeprefix("_") for t in CHECKS]


def _keeps_shape_and_type(built: Built) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            given, base = tensors(shape, 2, dtype)
            out = merge_one(built, "x", given, base)
            assert out.shape == shape, f"{built.id}: shape {tuple(out.shape)} instead of {shape}"
            assert out.dtype == dtype, f"{built.id}: type {out.dtype} instead of {dtype}"


def _leaves_its_inputs_alone(built: Built) -> None:
    given, base = tensors((5, 4), 2)
    before = [t.clone() for t in (*given, base)]
    merge_one(built, "x", given, base)
    same = all(torch.equal(a, b) for a, b in zip(before, (*given, base), strict=True))
    assert same, f"{built.id} changes its inputs"


def _is_repeatable(built: Built) -> None:
    given, base = tensors((5, 4), 2)
    first, second = (merge_one(built, "x", given, base) for _ in range(2))
    assert torch.equal(first, second), f"{built.id} gives two results for the same inputs"


def _identical_models_equal_to_the_base_stay(built: Built) -> None:
    _, base = tensors((5, 4), 2)
    out = merge_one(built, "x", [base.clone(), base.clone()], base)
    torch.testing.assert_close(out, base, msg=f"{built.id} changes models that are all the base")


def _stays_near_its_inputs(built: Built) -> None:
    given, base = tensors((20, 20), 2)
    gap = (merge_one(built, "x", given, base) - base).norm() / base.norm()
    assert gap < 1, f"{built.id} leaves the neighbourhood of its inputs (relative distance {float(gap):.3g})"


CHECKS = (
    _keeps_shape_and_type,
    _leaves_its_inputs_alone,
    _is_repeatable,
    _identical_models_equal_to_the_base_stay,
    _stays_near_its_inputs,
)
