"""Merging models tensor by tensor: never more than one tensor of every input, and one output shard, in
memory."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metier.core.errors import MetierError, UsageError, nearest
from metier.core.export import vacant
from metier.core.part import Built
from metier.core.runfolder import publish, write_json

SHARD_BYTES = 4 * 2**30
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
"""Configuration and tokenizer files that go along with the weights."""
OURS = {INDEX, "run.json", "MANIFEST.json", "merge_card.json", "export_card.json"}
IRRELEVANT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True)
class Entry:
    """One tensor as a file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Input:
    """One model to merge: its files, and what their headers say."""

    where: Path
    files: tuple[Path, ...]
    entries: dict[str, Entry]


@dataclass(frozen=True)
class Merged:
    """What a merge wrote; the same facts are in ``merge_card.json``."""

    folder: Path
    card: dict[str, Any]


def open_input(where: str | Path) -> Input:
    """A model folder, a checkpoint folder (``step-…``), or one ``.safetensors`` file. Reads headers only.

    Raises ``UsageError`` when there are no weights, saying what to do with a run or an adapter.
    """
    path = Path(where)
    files = _files(path)
    entries: dict[str, Entry] = {}
    for file in files:
        with _reader(file) as f:
            for name in f.keys():  # noqa: SIM118 - not a mapping
                view = f.get_slice(name)
                entries[name] = Entry(file, tuple(view.get_shape()), str(view.get_dtype()))
    return Input(path, files, entries)


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_file() and path.suffix == ".safetensors":
        return (path,)
    if (path / INDEX).is_file():
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        files = tuple(path / n for n in sorted(set(index["weight_map"].values())))
        if missing := [f for f in files if not f.is_file() or f.parent != path]:
            raise UsageError(f"{path}: the shard {missing[0].name} is missing")
        return files
    if (path / WEIGHTS).is_file():
        return (path / WEIGHTS,)
    if (path / "model").is_dir():
        return _files(path / "model")
    if (path / "adapter").is_dir() or (path / "adapter_config.json").is_file() or (path / "adapter.json").is_file():
        raise UsageError(
            f"{path} holds an adapter, not a model",
            hint="Write its model first: metier export RUN --merged OUT",
        )
    raise UsageError(
        f"{path} has no weights" if path.exists() else f"{path} does not exist",
        hint="Expected a folder with model.safetensors (or shards), or a .safetensors file.",
    )


@contextlib.contextmanager
def _reader(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError

    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise UsageError(f"{file} is not a complete safetensors file: {e}") from e


def merge(
    built: Built, inputs: Sequence[str | Path], out: str | Path, *, base: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Merged:  # fmt: skip
    """Merge ``inputs`` in the order written with the part ``built`` and write a model folder to ``out``.

    ``out`` must not exist. Tensors that are not floating point must be equal in all inputs. Results have the
    shape and type of the first input's tensors. Raises ``UsageError`` before anything is written when the
    inputs do not fit.
    """
    target = vacant(out)
    if not inputs:
        raise UsageError("nothing to merge")
    if "base" in built.needs and base is None:
        raise UsageError(f"{built.id} needs the base model", hint="Give it with --base.")
    sources = [open_input(i) for i in inputs]
    origin = None if base is None else open_input(base)
    for other in [*sources[1:], *([origin] if origin else [])]:
        _check_same(sources[0], other)
    card = _card(built, sources, origin)
    publish(target, lambda aside: _write(built, sources, origin, aside, card, shard_bytes))
    return Merged(target, card)


def _check_same(first: Input, other: Input) -> None:
    for name in sorted(first.entries.keys() ^ other.entries.keys()):
        here, there = (first, other) if name in first.entries else (other, first)
        close = nearest(name, there.entries)
        raise UsageError(
            f"{there.where} has no tensor {name!r}, {here.where} has it",
            hint=f"The nearest there is {close!r}." if close else None,
        )
    for name, entry in first.entries.items():
        if entry.shape != other.entries[name].shape:
            shapes = f"{list(entry.shape)} in {first.where}, {list(other.entries[name].shape)} in {other.where}"
            raise UsageError(f"the tensor {name!r} is {shapes}")


def _card(built: Built, sources: Sequence[Input], origin: Input | None) -> dict[str, Any]:
    return {
        "part": built.id,
        "options": built.options,
        "inputs": [_describe(s) for s in sources],
        "base": None if origin is None else _describe(origin),
        "tensors": len(sources[0].entries),
        "config_differs": _config_differences(sources),
    }


def _describe(source: Input) -> dict[str, Any]:
    return {"path": str(source.where), "sha256": {f.name: _sha256(f) for f in source.files}}


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _config_differences(sources: Sequence[Input]) -> list[str]:
    """Configuration keys in which the inputs differ: the first input's values are kept."""
    paths = [s.files[0].parent / "config.json" for s in sources]
    configs = [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.is_file()]
    keys = {k for c in configs for k in c} - IRRELEVANT
    return sorted(k for k in keys if any(c.get(k) != configs[0].get(k) for c in configs))


def _write(
    built: Built,
    sources: Sequence[Input],
    origin: Input | None,
    aside: Path,
    card: dict[str, Any],
    shard_bytes: int,
) -> None:
    shards = _plan(sources[0], shard_bytes)
    place: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(_merged_tensors(built, sources, origin, names)), aside / file, metadata={"format": "pt"})
        place |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_bytes(e) for e in sources[0].entries.values())
        write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": place})
    card["files_from"] = _copy_companions([*sources, *([origin] if origin else [])], aside)
    write_json(aside / "merge_card.json", card)


def _bytes(entry: Entry) -> int:
    width = {"BOOL": 1}.get(entry.dtype) or int(re.findall(r"\d+", entry.dtype)[0]) // 8
    size = max(1, width)
    for n in entry.shape:
        size *= n
    return size


def _plan(source: Input, shard_bytes: int) -> list[list[str]]:
    """Tensor names per output file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in source.entries.items():
        size = _bytes(entry)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _merged_tensors(
    built: Built, sources: Sequence[Input], origin: Input | None, names: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    with contextlib.ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(source: Input, name: str) -> Tensor:
            file = source.entries[name].file
            if file not in opened:
                opened[file] = stack.enter_context(_reader(file))
            return opened[file].get_tensor(name)

        for name in names:
            tensors = [read(s, name) for s in sources]
            yield name, merge_one(built, name, tensors, None if origin is None else read(origin, name))


@torch.no_grad()
def merge_one(built: Built, name: str, tensors: list[Tensor], base: Tensor | None) -> Tensor:
    """One merged tensor, checked: shape kept, finite, type of the first input."""
    first = tensors[0]
    if not first.is_floating_point():
        if any(not torch.equal(first, t) for t in tensors[1:]):
            raise UsageError(f"the tensor {name!r} is not floating point and differs between the inputs")
        return first
    try:
        result = built.obj(tensors, base)
    except UsageError as e:
        raise UsageError(e.what, where=e.where or built.id, hint=e.hint) from e
    if result.shape != first.shape:
        raise MetierError(f"{built.id} made {list(result.shape)} of the tensor {name!r}, which is {list(first.shape)}")
    result = result.to(first.dtype).contiguous()
    if not bool(torch.isfinite(result).all()):
        raise MetierError(f"the merged tensor {name!r} is not finite")
    return result.clone() if any(result.data_ptr() == t.data_ptr() for t in tensors) else result


def _copy_companions(candidates: Sequence[Input], aside: Path) -> str | None:
    """Copy configuration and tokenizer from the first candidate that has them; a checkpoint's are in its
    run."""
    folders = [f for c in candidates for f in _config_folders(c)]
    for folder in folders:
        if (folder / "config.json").is_file():
            for glob in COMPANIONS:
                for file in folder.glob(glob):
                    if file.name not in OURS:
                        shutil.copyfile(file, aside / file.name)
            return str(folder)
    return None


def _config_folders(source: Input) -> list[Path]:
    own = source.files[0].parent
    in_run = own.parent.name == "checkpoints" or own.name.startswith("step-")
    return [own, own.parent.parent / "model"] if in_run else [own]
