"""Items to rows: padding, packing, prompt-once groups, and the positions that carry loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metier.core.data.encode import Item
from metier.core.layout import Layout

PER_TARGET = ("weight", "reference", "old_logps")
"""Values per token in an item's ``extra`` that belong to the token as a target; all others are inputs of the model."""


@dataclass
class _Rows:
    """Growing arrays of a layout under construction."""

    ids: np.ndarray
    position: np.ndarray
    group: np.ndarray
    branch: np.ndarray
    row: list[np.ndarray] = field(default_factory=list)
    col: list[np.ndarray] = field(default_factory=list)
    own: list[np.ndarray] = field(default_factory=list)
    target: list[np.ndarray] = field(default_factory=list)
    sequence: list[np.ndarray] = field(default_factory=list)
    end: list[tuple[int, int]] = field(default_factory=list)
    answers: int = 0

    def put(self, item: Item, r: int, begin: int, group: int) -> None:
        """Lay one item into row ``r`` from column ``begin``."""
        p = len(item.prompt)
        self._span(r, begin, item.prompt, 0, group, 0)
        where = np.flatnonzero(item.prompt_loss[1:]) + begin
        self._targets(r, where, where + 1)
        at = begin + p
        for k, (ids, loss) in enumerate(zip(item.answers, item.answer_loss, strict=True)):
            self._span(r, at, ids, p, group, k + 1)
            offset = np.flatnonzero(loss)
            self._targets(r, np.where(offset == 0, begin + p - 1, at + offset - 1), at + offset, k)
            at += len(ids)
            self.end.append((r, at - 1))
        if not item.answers:
            self.end.append((r, at - 1))
        self.answers += max(1, len(item.answers))

    def _span(self, r: int, at: int, ids: np.ndarray, position: int, group: int, branch: int) -> None:
        part = slice(at, at + len(ids))
        self.ids[r, part] = ids
        self.position[r, part] = np.arange(position, position + len(ids))
        self.group[r, part] = group
        self.branch[r, part] = branch

    def _targets(self, r: int, predicted_at: np.ndarray, stands_at: np.ndarray, answer: int = 0) -> None:
        self.row.append(np.full(len(predicted_at), r))
        self.col.append(predicted_at)
        self.own.append(stands_at)
        self.target.append(self.ids[r, stands_at])
        self.sequence.append(np.full(len(predicted_at), self.answers + answer))


def collate(items: Sequence[Item], *, pad_id: int, rows: Sequence[Sequence[int]] | None = None) -> Layout:
    """One layout of the items, in order. ``rows`` lists the items of each packed row; default: one item per row.

    The first token of a sequence is never a target: nothing predicts it.
    """
    rows = rows if rows is not None else [[i] for i in range(len(items))]
    width = max(sum(items[i].length for i in row) for row in rows)
    shape = (len(rows), width)
    position, group, branch = (np.zeros(shape, np.int64) for _ in range(3))
    built = _Rows(np.full(shape, pad_id, np.int64), position, group, branch)
    place = {i: (r, g) for r, row in enumerate(rows) for g, i in enumerate(row)}
    begins = {i: sum(items[j].length for j in rows[r][:g]) for i, (r, g) in place.items()}
    for i, item in enumerate(items):
        built.put(item, place[i][0], begins[i], place[i][1] + 1)
    row, own = _cat(built.row), _cat(built.own)
    extra = _extra(items, place, begins, shape)
    per_target = {name: extra.pop(name)[row, own] for name in PER_TARGET if name in extra}
    return Layout(
        *(torch.from_numpy(a) for a in (built.ids, built.position, built.group, built.branch)),
        row=row, col=_cat(built.col), target=_cat(built.target), sequence=_cat(built.sequence),
        ids=tuple(i.id for i in items), label=_labels(items), answers=tuple(max(1, len(i.answers)) for i in items),
        end=torch.tensor(built.end, dtype=torch.int64).view(-1, 2), extra=extra, **per_target,
    )  # fmt: skip


def _cat(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)


def _labels(items: Sequence[Item]) -> Tensor | None:
    labels: list[Any] = [i.label for i in items]
    if any(label is None for label in labels):
        return None
    if isinstance(labels[0], tuple):
        out = torch.zeros(len(labels), max(map(len, labels)))
        for row, scores in zip(out, labels, strict=True):
            row[: len(scores)] = torch.tensor(scores)
        return out
    return torch.tensor(labels)


def _extra(items: Sequence[Item], place: dict, begins: dict, shape: tuple[int, int]) -> dict[str, Tensor]:
    out: dict[str, np.ndarray] = {}
    for i, item in enumerate(items):
        for name, values in item.extra.items():
            absent = 1 if name == "weight" else 0
            array = out.setdefault(name, np.full(shape, absent, values.dtype))
            array[place[i][0], begins[i] : begins[i] + len(values)] = values
    return {k: torch.from_numpy(v) for k, v in out.items()}


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most ``capacity`` tokens, by first fit of the lengths in falling order; deterministic."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fit = next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if fit is None:
            rows.append([])
            free.append(max(capacity, lengths[i]))
            fit = len(rows) - 1
        rows[fit].append(i)
        free[fit] -= lengths[i]
    return rows
