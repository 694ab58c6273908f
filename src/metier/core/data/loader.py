"""Batches in a fixed order, resumable at any step, the same for any micro-batch size, world size or number of workers."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from metier.core.context import derive_seed
from metier.core.data.collate import collate, pack
from metier.core.data.encode import Item
from metier.core.errors import MetierError, UsageError
from metier.core.layout import Layout
from metier.core.separate import separate

WASTE, PACKED_WASTE = 0.12, 0.05
"""Rows share a micro-batch while padding stays below this share of it; packed rows are long enough to be alone."""


@dataclass(frozen=True)
class Step:
    """The examples of one optimizer step on this process."""

    micro: list[Layout]
    units: int
    """Loss units (targets, or examples) of the whole step over all processes."""
    ids: tuple[str, ...]
    """Identity of every example of the step on this process."""


@dataclass(frozen=True)
class Shape:
    """How examples become rows."""

    pad_id: int
    budget: int
    """Tokens, padding included, that one micro-batch may hold when ``micro_batch`` is not given."""
    micro_batch: int | None = None
    packed: bool = False
    max_length: int = 1024
    unit: str = "token"
    """What the loss is divided by: ``token`` or ``example``."""
    separate: bool = False
    """Every answer in a row of its own, with its own copy of the prompt."""
    spare: int = 0
    """Padding tokens of a micro-batch that cost less than another pass of the model."""

    def micros(self, items: Sequence[Item]) -> list[list[list[int]]]:
        """Micro-batches as lists of rows, a row as a list of item indices; long ones first, like beside like."""
        sizes = [self._size(i) for i in items]
        if self.packed:
            rows = pack([width for _, width in sizes], self.max_length)
            rows.sort(key=lambda row: -sum(sizes[i][1] for i in row))
        else:
            rows = [[i] for i in sorted(range(len(items)), key=lambda i: (-sizes[i][1], i))]
        out: list[list[list[int]]] = []
        for row in rows:
            if not out or not self._fits(out[-1], row, sizes):
                out.append([])
            out[-1].append(row)
        return out

    def _size(self, item: Item) -> tuple[int, int]:
        """Number of rows that an item takes, and their width."""
        if self.separate and item.answers:
            return len(item.answers), len(item.prompt) + max(map(len, item.answers))
        return 1, item.length

    def _fits(self, rows: list[list[int]], row: list[int], sizes: list[tuple[int, int]]) -> bool:
        if self.micro_batch is not None:
            return sum(map(len, rows)) + len(row) <= self.micro_batch
        together = [(max(sizes[i][0] for i in r), sum(sizes[i][1] for i in r)) for r in (*rows, row)]
        area = max(width for _, width in together) * sum(height for height, _ in together)
        padding = area - sum(h * w for h, w in together)
        waste = PACKED_WASTE if self.packed else WASTE
        return area <= self.budget and padding <= max(waste * area, self.spare)

    def layouts(self, items: Sequence[Item], micros: list[list[list[int]]]) -> list[Layout]:
        """The rows of :meth:`micros` as layouts."""
        out = []
        for rows in micros:
            order = [i for row in rows for i in row]
            at = {i: k for k, i in enumerate(order)}
            made = collate([items[i] for i in order], pad_id=self.pad_id, rows=[[at[i] for i in row] for row in rows])
            out.append(separate(made, self.pad_id) if self.separate else made)
        return out

    def units(self, items: Sequence[Item]) -> int:
        """Loss units of examples."""
        return sum(i.targets for i in items) if self.unit == "token" else len(items)


@dataclass(frozen=True)
class Ramp:
    """A batch size that grows with the examples consumed: a function of the position alone.

    From ``start`` in equal stretches by ``increment`` up to the full batch, which is reached after ``examples``.
    """

    start: int
    increment: int
    examples: int

    def at(self, position: int, batch: int) -> int:
        """The batch size of the step that begins at ``position``; ``batch`` is the full one."""
        increments = math.ceil((batch - self.start) / self.increment)
        done = increments if position >= self.examples else position * increments // self.examples
        return min(batch, self.start + done * self.increment)


def split_to(micros: list[list[list[int]]], number: int) -> list[list[list[int]]]:
    """Cut micro-batches until there are ``number``, or until each holds one example."""
    micros = list(micros)
    while len(micros) < number:
        at = max(range(len(micros)), key=lambda k: sum(map(len, micros[k])), default=-1)
        if at < 0 or sum(map(len, micros[at])) < 2:
            break
        rows = micros[at]
        if len(rows) == 1:
            rows = [rows[0][: len(rows[0]) // 2], rows[0][len(rows[0]) // 2 :]]
        half = len(rows) // 2
        micros[at : at + 1] = [rows[:half], rows[half:]]
    return micros


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order of ``n`` items in an epoch."""
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(n)


class Loader:
    """An endless (or ``stop_at``-limited) iterator of :class:`Step`.

    ``items`` are shuffled anew in every epoch; with ``stream`` the items of an epoch come from a source instead.
    """

    def __init__(
        self, items: Sequence[Item] | None, stream: Callable[[int, Callable[[], float]], Iterator[Item]] | None, shape: Shape, *,
        fingerprint: dict[str, Any], seed: int, batch: int, rank: int = 0, world: int = 1, shuffle: bool = True, workers: int = 0,
        mean_length: float = 0.0, ramp: Ramp | None = None,
    ) -> None:  # fmt: skip
        name, least = ("train.batch_ramp.start", ramp.start) if ramp else ("train.batch", batch)
        if least < world:
            raise UsageError(f"{name} = {least} leaves some of the {world} processes without an example")
        self.items, self.stream, self.shape = items, stream, shape
        self.fingerprint, self.seed, self.batch = fingerprint, seed, batch
        self.rank, self.world, self.shuffle, self.workers = rank, world, shuffle, workers
        self.position = 0
        """Examples consumed so far."""
        self.epoch, self.drawn = 0, 0
        self.stop_at: int | None = None
        """Examples after which the data end; the session sets it from the number of epochs."""
        self.expected = 0
        """Examples of the whole run, for sources that depend on progress."""
        self.end_reason: str | None = None
        self.mean_length, self.ramp = mean_length, ramp

    @property
    def length(self) -> int | None:
        """Examples of one epoch; ``None`` for a stream."""
        return None if self.items is None else len(self.items)

    @property
    def tokens_per_step(self) -> float:
        """Expected real tokens of the next step."""
        return self.mean_length * self.batch_at(self.position)

    def batch_at(self, position: int) -> int:
        """Examples of the step that begins at ``position``, while the data last."""
        return self.batch if self.ramp is None else self.ramp.at(position, self.batch)

    def steps_for(self, examples: float) -> int:
        """Number of steps, from the beginning, that consume at least ``examples``; at least 1."""
        if self.ramp is None:
            return max(1, math.ceil(examples / self.batch))
        steps = position = 0
        while position < examples or steps == 0:
            steps, position = steps + 1, position + self.batch_at(position)
        return steps

    def examples_in(self, steps: int) -> int:
        """Examples that the first ``steps`` steps consume."""
        position = 0
        for _ in range(steps):
            position += self.batch_at(position)
        return position

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the data stand: small and JSON-able."""
        return {
            "position": self.position,
            "epoch": self.epoch,
            "drawn": self.drawn,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises ``UsageError`` when the data are others; the stored seed is used."""
        now, then = self.fingerprint, state["fingerprint"]
        changed = sorted(k for k in {*now, *then} if now.get(k) != then.get(k))
        if changed:
            raise UsageError(
                f"the checkpoint was trained on other data: {', '.join(changed)} changed since",
                hint="Restore them, or start afresh with --restart or another out=…",
            )
        self.position, self.epoch, self.drawn, self.seed = (
            state["position"],
            state["epoch"],
            state["drawn"],
            state["seed"],
        )

    # --- order -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Step]:
        if self.stream is not None:
            yield from self._from_stream()
            return
        starts = self._starts()
        if self.workers == 0:
            for position in starts:
                step, self.position = self._make(self._chosen(position))
                yield step
            return
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = [pool.submit(self._make_at, p) for p in islice(starts, self.workers + 1)]
            while waiting:
                step, self.position = waiting.pop(0).result()
                waiting += [pool.submit(self._make_at, p) for p in islice(starts, 1)]
                yield step

    def _starts(self) -> Iterator[int]:
        position = self.position
        while self._take(position) > 0:
            yield position
            position += self._take(position)
        self.end_reason = "the data have ended"

    def _take(self, position: int) -> int:
        """Examples of the step that begins at ``position``; the last one may be smaller."""
        batch = self.batch_at(position)
        return batch if self.stop_at is None else max(0, min(batch, self.stop_at - position))

    def _chosen(self, position: int) -> tuple[list[Item], int]:
        assert self.items is not None
        n = len(self.items)
        end = position + self._take(position)
        return [self.items[self._index(p // n, p % n)] for p in range(position, end)], end

    def _index(self, epoch: int, place: int) -> int:
        if not self.shuffle:
            return place
        assert self.items is not None
        return int(_permutation(self.seed, epoch, len(self.items))[place])

    def _make_at(self, position: int) -> tuple[Step, int]:
        return self._make(self._chosen(position))

    def _make(self, chosen: tuple[list[Item], int]) -> tuple[Step, int]:
        """This process's share of a step. Processes run the same number of forward passes, some with a filler."""
        items, end = chosen
        ordered = sorted(range(len(items)), key=lambda i: (-items[i].length, i))
        shares = [[items[i] for i in ordered[r :: self.world]] for r in range(self.world)]
        plans = [self.shape.micros(share) for share in shares]
        number = max(map(len, plans))
        layouts = self.shape.layouts(shares[self.rank], split_to(plans[self.rank], number))
        if missing := number - len(layouts):
            (shortest,) = self.shape.layouts([items[ordered[-1]]], [[[0]]])
            layouts += [replace(shortest, filler=True, ids=())] * missing
        return Step(layouts, self.shape.units(items), tuple(i.id for i in shares[self.rank])), end

    def _from_stream(self) -> Iterator[Step]:
        source = self._from_epochs()
        while want := self._take(self.position):
            drawn = list(islice(source, want))
            if len(drawn) < want:
                return
            step, self.position = self._make(([item for item, _, _ in drawn], self.position + want))
            _, self.epoch, self.drawn = drawn[-1]
            yield step
        self.end_reason = "the data have ended"

    def _from_epochs(self) -> Iterator[tuple[Item, int, int]]:
        """Items of this epoch from the current place, then of the following ones, each with (epoch, items up to it)."""
        epoch, skip, began = self.epoch, self.drawn, self.position - self.drawn
        while True:
            made = 0
            for item in self._epoch(epoch, began):
                made += 1
                if made > skip:
                    yield item, epoch, made
            if made < skip:
                raise MetierError(
                    f"the data source gave {made} examples in epoch {epoch + 1}, but {skip} before the checkpoint: "
                    "it is not reproducible, so the run cannot be continued exactly"
                )  # fmt: skip
            if made == 0:
                self.end_reason = f"the data source gave no example in epoch {epoch + 1}"
                return
            epoch, skip, began = epoch + 1, 0, began + made

    def _epoch(self, epoch: int, began: int) -> Iterator[Item]:
        """Items of an epoch; ``began`` is how many the run had consumed before it."""
        assert self.stream is not None
        number = 0

        def progress() -> float:
            return min(1.0, (began + number) / self.expected) if self.expected else 0.0

        try:
            for item in self.stream(epoch, progress):
                number += 1
                yield item
        except MetierError:
            raise
        except Exception as e:
            raise MetierError(
                f"the data source failed at example {number + 1} of epoch {epoch + 1}: {type(e).__name__}: {e}"
            ) from e
