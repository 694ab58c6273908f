"""From a run file's ``data`` section to a loader: rows, format, held-out part, encoding, batches."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from metier.core import models
from metier.core.batch import Labels, Lists, Pairs, Rated, Rollouts, Tokens
from metier.core.config import Data
from metier.core.context import derive_seed
from metier.core.data import formats
from metier.core.data.encode import Encoder, Item, chunks
from metier.core.data.formats import examples
from metier.core.data.loader import Loader, Shape
from metier.core.data.rows import Rows, open_rows
from metier.core.engine import Engine
from metier.core.errors import UsageError
from metier.core.layout import Layout
from metier.core.resolve import Resolved

READS: dict[type, tuple[type, ...]] = {
    Tokens: (formats.Text, formats.Chat, formats.Completion),
    Rollouts: (formats.Text, formats.Chat, formats.Completion),
    Pairs: (formats.Preference,),
    Rated: (formats.Judged,),
    Lists: (formats.Ranked,),
    Labels: (formats.Labelled,),
}
Notice = Callable[[str], None]


@dataclass
class OpenData:
    """Data of a run, converted and checked; encoded once the tokenizer is there."""

    resolved: Resolved
    engine: Engine
    notice: Notice
    train: dict[str, list[Any]]
    """Examples by input name; one input called ``train`` unless the run file names several."""
    held_out: list[Any]
    fingerprint: dict[str, Any]
    labels: dict[Any, int] = field(default_factory=dict)

    @property
    def task(self) -> models.Task:
        return "classify" if self.resolved.reads is Labels else "lm"

    @property
    def num_labels(self) -> int:
        return max(2, max(self.labels.values(), default=1) + 1)

    @property
    def settings(self) -> Data:
        return self.resolved.run.data

    def encode(self, bundle: models.Bundle) -> tuple[Loader, list[Layout]]:
        """The loader and the held-out layouts. Raises ``UsageError`` when nothing is left to train on."""
        run, tokenizer = self.resolved.run, bundle.tokenizer
        encoder = self.encoder(tokenizer)
        self.fingerprint.update(tokenizer_fingerprint(tokenizer))
        shape = self.shape(bundle)
        stream = None if self.resolved.source is None else self._stream(encoder)
        items = None if stream is not None else self._items(encoder, [e for part in self.train.values() for e in part])
        held = self._held_out(encoder)
        if said := encoder.summary():
            self.notice(said)
        lengths = [i.length for i in items or self._sample(encoder)]
        loader = Loader(
            items, stream, shape, fingerprint=self.fingerprint, seed=run.train.seed, batch=run.train.batch,
            rank=self.engine.rank, world=self.engine.world, shuffle=self.settings.shuffle, workers=run.train.workers,
            mean_length=float(np.mean(lengths)),
        )  # fmt: skip
        return loader, shape.layouts(held, shape.micros(held)) if held else []

    def encoder(self, tokenizer: Any) -> Encoder:
        """The encoder that the settings ask for."""
        d = self.settings
        return Encoder(tokenizer, max_length=d.max_length, truncate=d.truncate, on_empty=d.on_empty, labels=self.labels)

    def shape(self, bundle: models.Bundle) -> Shape:
        """How examples become rows for this model and device."""
        run = self.resolved.run
        unit = "token" if self.resolved.reads in (Tokens, Rollouts) else "example"
        pad = bundle.tokenizer.pad_token_id
        return Shape(
            pad if pad is not None else 0, token_budget(bundle.model.config, self.engine.device.type), run.train.micro_batch,
            run.data.packed, run.data.max_length, unit,
        )  # fmt: skip

    def _items(self, encoder: Encoder, found: list[Any]) -> list[Item]:
        if not self.settings.chunk:
            return encoder.all(found)
        key = (self.fingerprint["train"], str(tokenizer_fingerprint(encoder.tokenizer)), encoder.max_length)
        return _blocks(_Memo(key, lambda: list(chunks(encoder, found, encoder.max_length))))

    def _held_out(self, encoder: Encoder) -> list[Item]:
        limit = self.settings.eval_limit
        if not self.held_out:
            return []
        if self.settings.chunk:
            found = []
            for item in chunks(encoder, self.held_out, encoder.max_length):
                if limit is not None and len(found) >= limit:
                    break
                found.append(item)
            return found
        return encoder.all(self.held_out[:limit])

    def _sample(self, encoder: Encoder) -> list[Item]:
        """A few items, for the mean length of a stream."""
        few = [e for part in self.train.values() for e in part[:50]]
        if self.settings.chunk:
            return list(chunks(encoder, few, encoder.max_length))
        return Encoder.all(self.encoder(encoder.tokenizer), few)

    def _stream(self, encoder: Encoder) -> Callable[[int, Callable[[], float]], Iterator[Item]]:
        assert self.resolved.source is not None
        source = self.resolved.source.built.obj
        seed = self.resolved.run.train.seed

        def stream(epoch: int, progress: Callable[[], float]) -> Iterator[Item]:
            rng = np.random.default_rng(derive_seed(seed, "source", epoch))
            drawn = source.stream(self.train, epoch=epoch, rng=rng, progress=progress)
            if self.settings.chunk:
                return iter(chunks(encoder, drawn, encoder.max_length))
            return (item for item in map(encoder, drawn) if item is not None)

        return stream


@dataclass(frozen=True)
class _Memo:
    """A computation with a key: equal keys share the result within a process (comparisons train many runs on one corpus)."""

    key: tuple[Any, ...]
    make: Callable[[], list[Item]] = field(compare=False)


@lru_cache(maxsize=4)
def _blocks(memo: _Memo) -> list[Item]:
    items = memo.make()
    if not items:
        raise UsageError("the texts together are shorter than one block of data.max_length")
    return items


def open_data(resolved: Resolved, engine: Engine, notice: Notice = lambda text: None) -> OpenData:
    """Read, convert and split the data of a run; everything that is wrong with them is said here, before a model loads."""
    data = resolved.run.data
    named = {"train": data.train} if isinstance(data.train, str) else data.train
    if len(named) > 1 and resolved.source is None:
        raise UsageError("several inputs need a source that mixes them", where=resolved.document.where(("data", "train")), hint="For example: data.source: mix")
    rows = {name: _open(where, data) for name, where in named.items()}
    held = _open(data.eval, data) if data.eval else None
    if held is None and data.eval_fraction:
        parts = {name: split(r, data.eval_fraction) for name, r in rows.items()}
        rows = {name: kept for name, (kept, _) in parts.items()}
        evaluated = [h for _, h in parts.values()]
    else:
        evaluated = [held] if held is not None else []
    train = {name: _convert(r, resolved, notice) for name, r in rows.items()}
    held_out = [e for r in evaluated for e in _convert(r, resolved, lambda _: None)]
    fingerprint = {
        "train": _join(r.fingerprint for r in rows.values()), "eval": _join(r.fingerprint for r in evaluated),
        "format": data.format, "max_length": data.max_length, "chunk": data.chunk, "truncate": data.truncate,
        "shuffle": data.shuffle, "source": resolved.source.built.id if resolved.source else None,
    }  # fmt: skip
    found = OpenData(resolved, engine, notice, train, held_out, fingerprint)
    if resolved.reads is Labels:
        found.labels = _labels([e for part in (*train.values(), held_out) for e in part])
    return found


def _open(where: str, data: Data) -> Rows:
    return open_rows(where, split=data.split, columns=data.columns, limit=data.limit)


def split(rows: Rows, fraction: float) -> tuple[Rows, Rows]:
    """Rows to train on and a held-out fraction, chosen by a fixed seed: the same for every run on these rows."""
    number = max(1, round(len(rows) * fraction))
    if number >= len(rows):
        raise UsageError(f"{rows.name} has only {len(rows)} rows: none is left to train on", where="data.eval_fraction")
    order = np.random.default_rng(derive_seed("held out", len(rows))).permutation(len(rows))
    held = set(order[:number].tolist())
    return rows.select(i for i in range(len(rows)) if i not in held), rows.select(sorted(held))


def _convert(rows: Rows, resolved: Resolved, notice: Notice) -> list[Any]:
    data = resolved.run.data
    found = examples(rows, data.format, notice=notice)
    wanted = READS[resolved.reads]
    if not isinstance(found[0], wanted):
        kinds = " or ".join(k.__name__.lower() for k in wanted)
        raise UsageError(
            f"{resolved.objective.built.id} reads {kinds} examples, but {rows.name} holds {type(found[0]).__name__.lower()} examples",
            where=resolved.document.where(("data", "train")), hint="See: metier data check, data.format",
        )  # fmt: skip
    if data.chunk and not isinstance(found[0], formats.Text):
        raise UsageError("data.chunk is for plain text", where=resolved.document.where(("data", "chunk")))
    return found


def _labels(found: list[formats.Labelled]) -> dict[Any, int]:
    """Class names numbered in sorted order; numbers stand for themselves."""
    names = {e.label for e in found}
    if all(isinstance(n, int) for n in names):
        return {n: n for n in names}
    return {n: i for i, n in enumerate(sorted(map(str, names)))}


def _join(parts: Any) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str]:
    """Hashes of vocabulary and template, which a resumed run must agree on."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = fast.to_str() if fast is not None else str(sorted(tokenizer.get_vocab().items()))
    return {
        "tokenizer": hashlib.sha256(text.encode()).hexdigest()[:32],
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:32],
    }


def activation_bytes(config: Any) -> int:
    """Bytes that one token's activations take for the backward pass: about 18 D + 6 F values per block, in fp32."""
    width = getattr(config, "hidden_size", 768)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    return 4 * getattr(config, "num_hidden_layers", 12) * (18 * width + 6 * inner)


def token_budget(config: Any, device: str) -> int:
    """Tokens per micro-batch: what 1 GiB of activations holds on a CPU, 40 % of the free memory on a GPU."""
    per_token = activation_bytes(config)
    if device == "cuda":
        import torch

        return max(1024, int(0.4 * torch.cuda.mem_get_info()[0]) // per_token)
    return min(16384, max(512, 2**30 // per_token))
