"""Log-probabilities under the reference model, computed once and kept on disk.

A cache is a folder: ``cache.json`` says which model, data and sizes it belongs to; ``block-00000.safetensors`` and so on
hold the scores of 256 examples each, one number per target token in the order of the text. An interrupted computation
goes on after its last block. On reading, every block's hash is compared and the first and last example are computed again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metier.core.cache import cache_folder
from metier.core.data.encode import Item
from metier.core.data.loader import Shape
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.files import remove_quietly
from metier.core.runfolder import write_json
from metier.core.scores import Reference
from metier.core.tensorfile import write_tensors

BLOCK = 256
CLOSE = 1e-3
"""Largest difference per answer, relative to its log-probability, between what is stored and what is computed again."""
Score = Callable[[Sequence[Item]], list[np.ndarray]]
"""Items -> for each, the log-probabilities of its targets."""


@dataclass(frozen=True)
class Identity:
    """What a cache belongs to."""

    model: str
    """Name of the reference model, for messages."""
    fingerprint: str
    """Of its configuration and weights."""
    template: str
    """Of tokenizer and chat template."""

    def of(self, items: Sequence[Item]) -> dict[str, Any]:
        """The content of ``cache.json``, without the blocks."""
        return {"format": 1, **self.__dict__, "data": _fingerprint(items), "examples": len(items), "block": BLOCK}


@dataclass(frozen=True)
class KeptScores:
    """Gives the items of a run their reference scores: ``kept(items, shape, "train")``."""

    identity: Identity
    reference: Reference
    engine: Engine
    notice: Callable[[str], None]
    folder: Path | None = None
    """Where the user wants them; one folder inside for each part of the data."""

    def __call__(self, items: list[Item], shape: Shape, part: str) -> list[Item]:
        """The items with scores; the first process writes what was missing, the others wait for it."""
        if not items:
            return items
        place = self.folder / part if self.folder else None
        found = None
        for rank in (0, 1):  # the first process computes, then the others read
            if min(self.engine.rank, 1) == rank:
                found = with_reference(
                    items, self.identity, lambda some: self.score(some, shape), folder=place, notice=self.notice,
                    write=self.engine.main,
                )  # fmt: skip
            self.engine.barrier()
        assert found is not None
        return found

    def score(self, items: Sequence[Item], shape: Shape) -> list[np.ndarray]:
        """Log-probabilities of every item's targets, in batches of like lengths."""
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(items)
        micros = shape.micros(items)
        for rows, layout in zip(micros, shape.layouts(items, micros), strict=True):
            order = [i for row in rows for i in row]
            with self.engine.autocast():
                logps = self.reference(layout.to(self.engine.device), False).float().cpu()
            for i, values in zip(order, logps.split([items[i].targets for i in order]), strict=True):
                found[i] = values.numpy()
        return found


def with_reference(
    items: Sequence[Item], identity: Identity, score: Score, *, folder: str | Path | None = None,
    notice: Callable[[str], None] = lambda text: None, write: bool = True,
) -> list[Item]:  # fmt: skip
    """The items with reference scores in ``extra["reference"]``, from ``folder`` or the user's cache; computed where missing.

    ``write`` is off in all processes but one: these compute what they do not find. Raises ``UsageError`` for a folder that
    belongs to another model, template or data, or whose stored scores are not what the model says.
    """
    wanted = identity.of(items)
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:24]
    place = Path(folder) if folder else cache_folder() / "reference" / key
    known = _known(place, wanted, chosen=folder is not None)
    found: list[np.ndarray] = []
    missing = sum(f"{i}" not in known for i in range(-(-len(items) // BLOCK)))
    if missing:
        notice(f"scoring {len(items)} examples under the reference {identity.model}; kept in {place}")
    for number, block in enumerate(_blocks(items)):
        stored = _read(place, number, known.get(str(number)))
        if stored is None:
            stored = score(block)
            if write:
                known[str(number)] = _store(place, number, stored)
                write_json(place / "cache.json", {**wanted, "blocks": known})
        else:
            for at in _checked(number, len(items)):
                _verify(block[at], stored[at], score, place)
        found += stored
    return [_scored(item, values) for item, values in zip(items, found, strict=True)]


def _blocks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for begin in range(0, len(items), BLOCK):
        yield items[begin : begin + BLOCK]


def _known(place: Path, wanted: dict[str, Any], *, chosen: bool) -> dict[str, str]:
    """Hashes of the blocks that are there, by number."""
    try:
        record = json.loads((place / "cache.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if other := [k for k, v in wanted.items() if record.get(k) != v]:
        said = f"made with {record.get('model')}, not {wanted['model']}" if "model" in other else f"another {', '.join(other)}"
        if chosen:
            raise UsageError(
                f"the reference scores in {place} do not belong to this run: {said}",
                where="reference_scores", hint="Name another folder, or say cached for one that metier chooses.",
            )  # fmt: skip
        remove_quietly(place)
        return {}
    return dict(record.get("blocks", {}))


def _store(place: Path, number: int, scores: list[np.ndarray]) -> str:
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"block-{number:05d}.safetensors"
    path.unlink(missing_ok=True)
    flat = np.concatenate(scores) if scores else np.zeros(0, np.float32)
    tensors = {"logps": torch.from_numpy(flat), "lengths": torch.tensor([len(s) for s in scores])}
    return write_tensors(path, tensors)["sha256"]


def _read(place: Path, number: int, digest: str | None) -> list[np.ndarray] | None:
    """A stored block; ``None`` when it is absent or damaged, so that it is computed again."""
    from safetensors.torch import load

    if digest is None:
        return None
    try:
        data = (place / f"block-{number:05d}.safetensors").read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != digest:
        return None
    found = load(data)
    return [t.numpy() for t in found["logps"].split(found["lengths"].tolist())]


def _checked(number: int, examples: int) -> list[int]:
    """Places in a stored block of the examples that are computed again: the very first and the very last."""
    return sorted(i - number * BLOCK for i in {0, examples - 1} if i // BLOCK == number)


def _verify(item: Item, stored: np.ndarray, score: Score, place: Path) -> None:
    (now,) = score([item])
    gap = abs(float(now.sum()) - float(stored.sum()))
    if now.shape != stored.shape or not gap <= CLOSE * max(1.0, abs(float(now.sum()))):
        raise UsageError(
            f"the reference scores in {place} are not what the model says now: {float(stored.sum()):.4f} is stored for "
            f"{item.id}, {float(now.sum()):.4f} computed",
            where="reference_scores", hint="Remove the folder; it will be made again.",
        )  # fmt: skip


def _scored(item: Item, values: np.ndarray) -> Item:
    """The item with one value per token; those of tokens without loss are never read."""
    loss = [item.prompt_loss.copy(), *item.answer_loss]
    loss[0][:1] = False
    spread = np.zeros(item.length, np.float32)
    spread[np.concatenate(loss)] = values
    return replace(item, extra={**item.extra, "reference": spread})


def _fingerprint(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        for part in (item.prompt, item.prompt_loss, *item.answers, *item.answer_loss):
            digest.update(len(part).to_bytes(4, "little") + part.tobytes())
    return digest.hexdigest()[:32]
