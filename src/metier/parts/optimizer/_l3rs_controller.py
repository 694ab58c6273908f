"""The controller of ``optimizer/l3rs``: a small network shared by all tensors, its features and its file.

File: safetensors with ``embedding`` [layers, q], ``hidden.weight`` [h, F], ``hidden.bias`` [h], ``out.weight`` [1 + P, h],
``out.bias`` [1 + P], and in its header the parameter names of the embedding's rows, the base rules, the EMA constants and
the time scales: ``{"l3rs": JSON}``. P is the number of base rules.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metier.core.errors import UsageError

KEY, FORMAT = "l3rs", 1
SCALES = (10.0, 100.0, 1000.0)
"""Time scales of a new controller, in steps."""
LIMIT = 10.0
"""Largest |s|: a learning rate stays within a factor 22026 of the reference, whatever the network says."""


@dataclass(frozen=True, eq=False)
class Controller:
    """A learned controller as its file holds it."""

    tensors: dict[str, Tensor]
    names: tuple[str, ...]
    bases: tuple[Any, ...]
    gammas: tuple[float, ...]
    scales: tuple[float, ...]

    def __call__(self, names: Sequence[str], averages: Tensor, k: int, progress: float | None) -> tuple[Tensor, Tensor]:
        """``s`` [L] and mixing weights ``μ`` [L, P] of L tensors.

        ``averages`` [L, S, G]: every statistic averaged with every constant; ``k`` = 0, 1, …: updates made before.
        """
        w = {key: t.to(averages) for key, t in self.tensors.items()}
        row = {name: i for i, name in enumerate(self.names)}
        table = torch.cat([w["embedding"], w["embedding"].new_zeros(1, w["embedding"].shape[1])])
        own = table[[row.get(n, len(self.names)) for n in names]]
        time = averages.new_tensor([0.0 if progress is None else progress, *(k / tau for tau in self.scales)])
        time = torch.cat([time[:1], time[1:].tanh()]).expand(len(names), -1)
        x = torch.cat([levels_and_trends(averages), time, own], dim=1)
        out = (x @ w["hidden.weight"].T + w["hidden.bias"]).tanh() @ w["out.weight"].T + w["out.bias"]
        return out[:, 0].clamp(-LIMIT, LIMIT), out[:, 1:].softmax(dim=1)


def levels_and_trends(averages: Tensor) -> Tensor:
    """``[L, S, G]`` → ``[L, S G (G+1)/2]``: per statistic its G averages and the differences of each two."""
    trends = [averages[..., i] - averages[..., j] for i, j in combinations(range(averages.shape[-1]), 2)]
    return torch.cat([averages, torch.stack(trends, dim=-1)] if trends else [averages], dim=-1).flatten(1)


def features(statistics: int, gammas: int, scales: int, embed: int) -> int:
    """Length F of the network's input."""
    return statistics * gammas * (gammas + 1) // 2 + 1 + scales + embed


def blank(
    names: Sequence[str], bases: Sequence[Any], gammas: Sequence[float], *, embed: int, hidden: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a new controller: random inside, its last layer and the embeddings zero."""
    f = features(3 + len(bases), len(gammas), len(SCALES), embed)
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "embedding": torch.zeros(len(names), embed),
        "hidden.weight": torch.randn(hidden, f, generator=draw) / f**0.5,
        "hidden.bias": torch.zeros(hidden),
        "out.weight": torch.zeros(1 + len(bases), hidden),
        "out.bias": torch.zeros(1 + len(bases)),
    }
    header = {"format": FORMAT, "names": list(names), "bases": list(bases), "gammas": list(gammas), "scales": list(SCALES)}
    return tensors, {KEY: json.dumps(header)}


def load(path: str | Path, *, bases: Sequence[Any], gammas: Sequence[float]) -> Controller:
    """The controller of a file, which must have been made for these base rules and constants.

    Raises ``UsageError`` for a missing, foreign, damaged or mismatching file.
    """
    file = Path(path)
    try:
        seen = file.stat()
    except OSError:
        raise UsageError(f"there is no controller file {path}", where="optimizer.l3rs.controller") from None
    found = _read(str(file.resolve()), seen.st_mtime_ns, seen.st_ino, seen.st_size)
    for what, here, there in (("bases", tuple(bases), found.bases), ("gammas", tuple(gammas), found.gammas)):
        if here != there:
            raise UsageError(
                f"{path} was learned with {what} {json.dumps(there)}, and the option is {json.dumps(here)}",
                where=f"optimizer.l3rs.{what}", hint=f"Say {what}: {json.dumps(there)}, or give another controller.",
            )  # fmt: skip
    return found


@lru_cache(maxsize=16)
def _read(path: str, *version: int) -> Controller:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise UsageError(f"{path} is not a controller file: {e}", where="optimizer.l3rs.controller") from e
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UsageError(
            f"{path} is not a controller of this version: its header has no {KEY!r} entry of format {FORMAT}",
            where="optimizer.l3rs.controller",
        )
    try:
        names, bases, gammas, scales = (tuple(header[k]) for k in ("names", "bases", "gammas", "scales"))
    except (KeyError, TypeError) as e:
        raise UsageError(f"{path}: the header lacks {e}", where="optimizer.l3rs.controller") from e
    _check_shapes(path, tensors, len(names), len(bases), features(3 + len(bases), len(gammas), len(scales), 0))
    return Controller(tensors, names, bases, gammas, scales)


def _check_shapes(path: str, tensors: dict[str, Tensor], layers: int, bases: int, f: int) -> None:
    """Sizes that the header implies; the widths of embedding and hidden layer are the file's own."""
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    q, h = ((*shapes.get(key, ()), 0, 0)[1] for key in ("embedding", "out.weight"))
    wanted = {
        "embedding": (layers, q), "hidden.weight": (h, f + q), "hidden.bias": (h,),
        "out.weight": (1 + bases, h), "out.bias": (1 + bases,),
    }  # fmt: skip
    if shapes != wanted:
        wrong = next(k for k in {**wanted, **shapes} if shapes.get(k) != wanted.get(k))
        raise UsageError(
            f"{path}: {wrong} is {shapes.get(wrong, 'missing')}, and its header asks for {wanted.get(wrong, 'no such tensor')}",
            where="optimizer.l3rs.controller",
        )
    broken = [k for k, t in tensors.items() if not t.is_floating_point() or not torch.isfinite(t).all()]
    if broken:
        raise UsageError(f"{path}: {broken[0]} is not finite", where="optimizer.l3rs.controller")
