"""From a run file's ``data`` section to a loader: rows, format, held-out part, encoding, batches."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from metier.core import models
from metier.core.batch import Labels, Lists, Pairs, Rated, Rewards, Rollouts, Tokens
from metier.core.config import Data
from metier.core.context import derive_seed
from metier.core.data import formats, rounds
from metier.core.data.budget import spare_tokens, token_budget
from metier.core.data.derive import derive
from metier.core.data.encode import Encoder, Item, chunks
from metier.core.data.formats import examples
from metier.core.data.heldout import divide
from metier.core.data.loader import Loader, Ramp, Shape
from metier.core.data.mismatch import mismatched
from metier.core.data.rows import Rows, open_rows
from metier.core.engine import Engine
from metier.core.errors import UsageError, unknown
from metier.core.layout import Layout
from metier.core.policy import Policy
from metier.core.resolve import Resolved
from metier.core.scores import Reference
from metier.core.separate import why_apart

READS: dict[type, tuple[type, ...]] = {
    Tokens: (formats.Text, formats.Chat, formats.Completion),
    Rollouts: (formats.Text, formats.Chat, formats.Completion),
    Pairs: (formats.Preference,),
    Rewards: (formats.Preference,),
    Rated: (formats.Judged,),
    Lists: (formats.Ranked, formats.Crossed),
    Labels: (formats.Labelled,),
}
ANSWERED = (Pairs, Rewards, Rated, Lists)
"""Batch types whose items have answers to a prompt."""
Notice = Callable[[str], None]
Scored = Callable[[list[Item], Shape, str], list[Item]]


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
        """What the model is loaded for; a reward model is a classifier with one output."""
        return "classify" if self.resolved.reads in (Labels, Rewards) else "lm"

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier's or reward model's head."""
        return 1 if self.resolved.reads is Rewards else max(2, len(self.labels))

    @property
    def settings(self) -> Data:
        """The ``data`` section of the run file."""
        return self.resolved.run.data

    def encode(
        self, bundle: models.Bundle, scored: Scored | None = None, initial: Reference | None = None, folder: Path = Path()
    ) -> tuple[Loader, list[Layout]]:
        """The loader and the held-out layouts. Raises ``UsageError`` when nothing is left to train on.

        ``scored`` gives items the scores of the reference model; ``initial`` and ``folder`` are for sources that use the model.
        """
        run, tokenizer = self.resolved.run, bundle.tokenizer
        encoder = self.encoder(tokenizer)
        if self.labels:
            bundle.model.config.id2label = {i: str(name) for name, i in self.labels.items()}
            bundle.model.config.label2id = {str(name): i for name, i in self.labels.items()}
        self.fingerprint.update(tokenizer_fingerprint(tokenizer))
        shape = self.shape(bundle)
        stream = None if self.resolved.source is None else self._stream(encoder, Policy(
            bundle, self.engine, self.encoder(tokenizer), shape, folder, self.resolved.reads, initial, run.reference
        ))  # fmt: skip
        items = None if stream is not None else self._items(encoder, [e for part in self.train.values() for e in part])
        held = self._held_out(encoder)
        if "mismatch" in self.resolved.needs:
            items = None if items is None else list(mismatched(items, encoder.max_length))
            held = list(mismatched(held, encoder.max_length))
        if said := encoder.summary():
            self.notice(said)
        if scored is not None:
            if items is None:
                raise UsageError(
                    f"{self.resolved.source.built.id if self.resolved.source else 'the source'} makes its examples while the run "
                    "goes on: their reference scores cannot be kept",
                    where="reference_scores", hint="Use reference_scores: live.",
                )  # fmt: skip
            items, held = scored(items, shape, "train"), scored(held, shape, "eval")
        loader = Loader(
            items, stream, shape, fingerprint=self.fingerprint, seed=run.train.seed, batch=run.train.batch,
            rank=self.engine.rank, world=self.engine.world, shuffle=self.settings.shuffle, workers=run.train.workers,
            mean_length=float(np.mean(self._lengths(encoder, items))), ramp=self._ramp(),
        )  # fmt: skip
        return loader, shape.layouts(held, shape.micros(held)) if held else []

    def _ramp(self) -> Ramp | None:
        train = self.resolved.run.train
        if train.batch_ramp is None:
            return None
        if train.batch_ramp.start > train.batch:
            raise UsageError(f"start = {train.batch_ramp.start} is above train.batch = {train.batch}", where="train.batch_ramp")
        return Ramp(train.batch_ramp.start, train.batch_ramp.increment, train.batch_ramp.examples)

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
            run.data.packed, run.data.max_length, unit, self._separate(bundle.model),
            spare_tokens(bundle.model, self.engine.device.type),
        )  # fmt: skip

    @property
    def grouped(self) -> bool:
        """Whether several sequences may share a row: answers to one prompt, or packed sequences."""
        return self.settings.packed or (self.settings.prompt_once and self.resolved.reads in ANSWERED)

    def _separate(self, model: Any) -> bool:
        """Whether every answer gets a row of its own. Raises ``UsageError`` for packed rows that cannot be."""
        answered, d, where = self.resolved.reads in ANSWERED, self.settings, self.resolved.document.where
        if d.packed and answered and not d.prompt_once:
            raise UsageError("data.packed shares rows, data.prompt_once: false gives every answer its own",
                             where=where(("data", "packed")), hint="Leave one of them out.")  # fmt: skip
        why = why_apart(model) if self.grouped or "policy" in self.resolved.needs else None
        if why and d.packed:
            raise UsageError(f"{model.config.model_type} cannot take several sequences in a row: {why}",
                             where=where(("data", "packed")), hint="Set data.packed: false.")  # fmt: skip
        if why and answered:
            self.notice(f"{model.config.model_type}: {why}; every answer gets a row with its own copy of the prompt")
        return bool(why) or not (d.prompt_once or d.packed)

    def _items(self, encoder: Encoder, found: list[Any]) -> list[Item]:
        if not self.settings.chunk:
            return encoder.all(found)
        data = (self.fingerprint["train"], self.settings.eval_fraction)
        key = (*data, str(tokenizer_fingerprint(encoder.tokenizer)), encoder.max_length)
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
        if limit is not None and limit < len(self.held_out):
            order = np.random.default_rng(derive_seed("eval limit", len(self.held_out))).permutation(len(self.held_out))
            return encoder.all(self.held_out[i] for i in sorted(order[:limit].tolist()))
        return encoder.all(self.held_out)

    def _lengths(self, encoder: Encoder, items: list[Item] | None) -> list[int]:
        """Lengths of the items; of a few where they come from a source."""
        if self.settings.chunk or "policy" in self.resolved.needs:
            return [encoder.max_length]
        few = [e for part in self.train.values() for e in part[:50]]
        return [i.length for i in items or self.encoder(encoder.tokenizer).all(few)]

    def _stream(self, encoder: Encoder, policy: Policy) -> Callable[[int, Callable[[], float]], Iterator[Item]]:
        assert self.resolved.source is not None
        built = self.resolved.source.built
        seed = self.resolved.run.train.seed

        def stream(epoch: int, progress: Callable[[], float]) -> Iterator[Item]:
            rng = np.random.default_rng(derive_seed(seed, "source", epoch))
            if "policy" in built.needs:
                wanted = readable(self.resolved)
                drawn = rounds.stream(built.obj, self.train, policy, wanted, epoch=epoch, rng=rng, notice=self.notice)
            else:
                drawn = built.obj.stream(self.train, epoch=epoch, rng=rng, progress=progress)
            if self.settings.chunk:
                return iter(chunks(encoder, drawn, encoder.max_length))
            items = (item for item in map(encoder, drawn) if item is not None)
            return mismatched(items, encoder.max_length) if "mismatch" in self.resolved.needs else items

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
    data, where = resolved.run.data, resolved.document.where
    named = {"train": data.train} if isinstance(data.train, str) else data.train
    if len(named) > 1 and resolved.source is None:
        raise UsageError(
            "several inputs need a source that mixes them",
            where=where(("data", "train")),
            hint="For example: data.source: mix",
        )
    if data.packed and resolved.reads is Labels:
        raise UsageError("data.packed has no meaning for classification", where=where(("data", "packed")))
    opened = {name: open_rows(w, split=data.split, columns=data.columns, limit=data.limit) for name, w in named.items()}
    evaluated = _held_rows(named, resolved)
    train: dict[str, list[Any]] = {}
    held_out: list[Any] = []
    for name, rows in opened.items():
        found, held = _convert(rows, resolved, notice, "train"), []
        if data.eval_fraction and not evaluated:
            found, held = divide(rows, found, data.eval_fraction, tails=data.chunk)
        prefix = f"{name}/" if len(opened) > 1 else ""  # files of the same name in several inputs
        train[name] = [replace(e, id=prefix + e.id) for e in found] if prefix else found
        held_out += [replace(e, id=prefix + e.id) for e in held]
    for rows in evaluated:
        held_out += _convert(rows, resolved, lambda _: None, "eval" if data.eval else "eval_split")
    train, held_out = _all_or_no_margins(train, notice), _all_or_no_margins({"": held_out}, notice)[""]
    source = resolved.source.built if resolved.source else None
    fingerprint = {
        "train": _join(r.fingerprint for r in opened.values()), "eval": _join(r.fingerprint for r in evaluated),
        "eval_fraction": data.eval_fraction, "format": data.format, "max_length": data.max_length, "chunk": data.chunk,
        "truncate": data.truncate, "shuffle": data.shuffle,
        "source": f"{source.id} {sorted(source.options.items())}" if source else None,
    }  # fmt: skip
    labels = _labels(train, held_out, notice) if resolved.reads is Labels else {}
    return OpenData(resolved, engine, notice, train, held_out, fingerprint, labels)


def _held_rows(named: Mapping[str, str], resolved: Resolved) -> list[Rows]:
    """Rows of ``eval``, or of ``train``'s data in ``eval_split``."""
    data = resolved.run.data
    if data.eval:
        return [open_rows(data.eval, split=data.eval_split if _has_splits(data.eval) else None, columns=data.columns)]
    if not data.eval_split:
        return []
    for where in named.values():
        if not _has_splits(where):
            raise UsageError(
                f"eval_split = {data.eval_split!r}, but {where} has no splits",
                where=resolved.document.where(("data", "eval_split")),
                hint="Say data.eval=FILE, or data.eval_split=null with data.eval_fraction.",
            )  # fmt: skip
    return [open_rows(where, split=data.eval_split, columns=data.columns) for where in named.values()]


def _has_splits(where: str) -> bool:
    return not where.startswith("lab/") and not Path(where).expanduser().is_file()


def _convert(rows: Rows, resolved: Resolved, notice: Notice, key: str) -> list[Any]:
    """All examples of ``rows``, of a type that the objective reads; ``key`` of ``data`` is where they were asked for."""
    data, where = resolved.run.data, resolved.document.where
    found: list[Any] = examples(rows, data.format, notice=notice, drop=data.on_bad == "drop")
    wanted = readable(resolved)
    if key == "train" and resolved.source is not None:
        wanted = resolved.source.built.takes or wanted
    if not isinstance(found[0], wanted) and (derived := derive(found, wanted)):
        found, sentence = derived
        notice(f"{rows.name}: {sentence}")
        if not found:
            raise UsageError(
                f"{rows.name} has nothing to learn from: all answers to a prompt are equally good", where=where(("data", key))
            )
    if not isinstance(found[0], wanted):
        kinds, kind = " or ".join(k.__name__.lower() for k in wanted), type(found[0]).__name__.lower()
        raise UsageError(
            f"{resolved.objective.built.id} reads {kinds} examples, but {rows.name} holds {kind} examples",
            where=where(("data", key)), hint="See: metier data check, data.format",
        )  # fmt: skip
    if data.chunk and not isinstance(found[0], formats.Text):
        raise UsageError("data.chunk is for plain text", where=where(("data", "chunk")))
    if "samples" in resolved.needs and data.source is None:
        _check_samples(found, resolved.objective.built.id)
    return found


def _all_or_no_margins(parts: dict[str, list[Any]], notice: Notice) -> dict[str, list[Any]]:
    """The same examples; pairs without margins unless all have one, so that all batches have the same fields."""
    pairs = [e for found in parts.values() for e in found if isinstance(e, formats.Preference)]
    with_margin = sum(e.margin is not None for e in pairs)
    if not 0 < with_margin < len(pairs):
        return parts
    notice(f"only {with_margin} of {len(pairs)} pairs have a margin; margins are not used")

    def bare(e: Any) -> Any:
        return replace(e, margin=None) if isinstance(e, formats.Preference) else e

    return {name: [bare(e) for e in found] for name, found in parts.items()}


def readable(resolved: Resolved) -> tuple[type, ...]:
    """Types of examples that the run's objective learns from: its ``takes``, else all that give its batch type."""
    return resolved.objective.built.takes or READS[resolved.reads]


def _check_samples(found: list[Any], objective: str) -> None:
    """Raise ``UsageError`` unless every pair brings as many samples of the reference, at least one."""
    number = len(found[0].samples)
    odd = next((e for e in found if len(e.samples) != number or not e.samples), None)
    if odd is not None:
        raise UsageError(
            f"{objective} needs answers sampled from the reference model; this row has {len(odd.samples)}"
            + (f", the first one {number}" if number != len(odd.samples) else ""),
            where=odd.id, hint="Give every row a key samples: [answer, …], or data.source: reference-samples.",
        )  # fmt: skip


def _labels(train: Mapping[str, list[Any]], held_out: list[Any], notice: Notice) -> dict[Any, int]:
    """Class of every label, numbered in sorted order. Raises ``UsageError`` for labels that cannot be told apart or learnt."""
    trained = [e for part in train.values() for e in part]
    names = {e.label for e in trained}
    if odd := next((e for e in trained if isinstance(e.label, str) != isinstance(trained[0].label, str)), None):
        raise UsageError(
            f"the label {odd.label!r} is a {'name' if isinstance(odd.label, str) else 'number'}, but {trained[0].label!r} is not",
            where=odd.id, hint="Labels are all numbers or all names.",
        )  # fmt: skip
    if len(names) == 1:
        raise UsageError(
            f"all {len(trained)} examples have the label {trained[0].label!r}",
            hint="Is data.limit too small for sorted rows?",
        )
    if strange := next((e for e in held_out if e.label not in names), None):
        raise unknown(
            "label of held-out data",
            str(strange.label),
            map(str, names),
            where=strange.id,
            more="No example to train on has it.",
        )
    found = {name: i for i, name in enumerate(sorted(names))}
    if any(name != i for name, i in found.items()):
        notice(
            "classes: " + ", ".join(f"{i} = {name}" for name, i in list(found.items())[:20]) + (", …" if len(found) > 20 else "")
        )
    return found


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
