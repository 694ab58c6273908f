"""Checkpoints on disk: written whole or not at all, verified before they are read, never pickled.

A checkpoint is a folder ``step-00000120`` with ``*.safetensors``, ``run.json`` and ``MANIFEST.json``, which
holds size and SHA-256 of every other file and a hash of itself. It is written under a hidden name and
renamed; *the rename is the commit*, and no "latest" pointer can disagree with it.

What this promises ends where the storage is not honest about ``fsync``.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor

from metier.core import files
from metier.core.errors import MetierError
from metier.core.pack import pack, unpack
from metier.core.tensorfile import check_header, read_tensors, write_tensors

__all__ = ["Checkpoint", "Damaged", "find", "pack", "read", "rotate", "unpack", "write"]

FORMAT = 1
MANIFEST = "MANIFEST.json"
META = "run.json"
MAX_MANIFEST = 1_000_000
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.(safetensors|json)", re.ASCII)
_COMMITTED = re.compile(r"step-(\d{8,18})", re.ASCII)
_REPLACED = re.compile(r"\.step-(\d{8,18})\.old-[0-9a-f]{8}", re.ASCII)
_UNFINISHED = re.compile(r"\.step-\d{8,18}\.tmp-[0-9a-f]{8}", re.ASCII)


class Damaged(MetierError):
    """A checkpoint that is incomplete, altered or not one at all; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory, on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """By file name without ending, then by tensor name."""
    meta: dict[str, Any]
    finite: bool
    """Whether weights and the last evaluation were finite when it was written."""
    path: Path


# --- writing ------------------------------------------------------------------------------------------------


def write(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    finite: bool,
) -> Path:
    """Write the checkpoint of ``step`` under ``root`` and return its folder.

    ``tensors`` maps file names without ending to tensors by name; each goes to disk one tensor at a time, so
    nothing is held twice. ``meta`` is JSON without NaN. The caller is the only writer of ``root`` (see
    ``core/lock.py``).

    Raises ``MetierError`` when the disk is full or a file operation fails; earlier checkpoints are then as
    before.
    """
    root, name = Path(root), f"step-{step:08d}"
    for stem in tensors:
        if not _FILE.fullmatch(f"{stem}.safetensors"):
            raise ValueError(f"{stem!r} cannot be the name of a checkpoint file")
    document = _dump(meta)
    aside = root / f".{name}.tmp-{secrets.token_hex(4)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        files.mkdir(aside)
        _fill(aside, step, tensors, document, finite)
        _commit(aside, root / name)
    except OSError as e:
        files.remove_quietly(aside)
        raise MetierError(_save_failed(root, step, e)) from e
    except BaseException:
        files.remove_quietly(aside)
        raise
    return root / name


def _fill(aside: Path, step: int, tensors: Mapping[str, Any], document: bytes, finite: bool) -> None:
    listed = {}
    for stem, named in tensors.items():
        listed[f"{stem}.safetensors"] = write_tensors(aside / f"{stem}.safetensors", named)
    files.write_new(aside / META, document)
    listed[META] = {"size": len(document), "sha256": hashlib.sha256(document).hexdigest()}
    files.write_new(aside / MANIFEST, _dump(_sealed({"format": FORMAT, "step": step, "finite": finite, "files": listed})))
    files.fsync_folder(aside)


def _commit(aside: Path, target: Path) -> None:
    """Rename into place. A checkpoint of the same step is moved aside first, where ``find`` still sees it."""
    old = None
    if target.is_dir() and not target.is_symlink():
        old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
        files.replace(target, old)
    try:
        files.replace(aside, target)
    except OSError:
        if old is not None:
            with contextlib.suppress(OSError):
                files.replace(old, target)
        raise
    files.fsync_folder(target.parent)
    _clean(target.parent)


def _clean(root: Path) -> None:
    """Remove what writers that died have left. Safe because the run folder has one writer, and that is us."""
    for entry in list(root.glob(".step-*")):
        replaced = _REPLACED.fullmatch(entry.name)
        superseded = replaced is not None and (root / f"step-{replaced[1]}" / MANIFEST).is_file()
        if (superseded or _UNFINISHED.fullmatch(entry.name)) and entry.is_dir() and not entry.is_symlink():
            files.remove_quietly(entry)


def _save_failed(root: Path, step: int, error: OSError) -> str:
    reason = error.strerror or str(error)
    try:
        space = os.statvfs(root)
        room = f" ({space.f_bavail * space.f_frsize / 1e6:.0f} MB free)"
    except OSError:
        room = ""
    return (
        f"the checkpoint of step {step} could not be written under {root}: {reason}{room}\n"
        "  Earlier checkpoints are as before; the same command continues from the newest one."
    )


def _dump(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "seal": hashlib.sha256(_dump(manifest)).hexdigest()}


# --- reading ------------------------------------------------------------------------------------------------


def read(path: Path) -> Checkpoint:
    """Verify a checkpoint (names, kinds of file, sizes, SHA-256), only then parse it. Raises ``Damaged``."""
    path = Path(path)
    manifest, meta = _verify(path)
    tensors = {}
    try:
        for name in manifest["files"]:
            if name.endswith(".safetensors"):
                tensors[name.removesuffix(".safetensors")] = read_tensors(path / name)
    except (OSError, ValueError) as e:
        raise Damaged(f"{path}: {e}") from e
    return Checkpoint(manifest["step"], tensors, meta, manifest["finite"], path)


def find(root: Path, log: Callable[[str], None] | None = None) -> Path | None:
    """The newest complete checkpoint under ``root``; ``log`` is told why newer ones were passed over.

    Nothing is changed on disk, so this may look into the folder of a run that is going on.
    """
    say = log or (lambda text: None)
    for path in _candidates(Path(root)):
        try:
            manifest, _ = _verify(path)
        except Damaged as e:
            say(f"passed over a checkpoint: {e}")
            continue
        if not manifest["finite"]:
            say(f"{path.name} is complete, but its weights or its evaluation were not finite")
        return path
    return None


def _candidates(root: Path) -> list[Path]:
    """Folders named like checkpoints, newest first; one being replaced comes after its replacement."""
    if not root.is_dir():
        return []
    found = []
    for entry in root.iterdir():
        committed, replaced = _COMMITTED.fullmatch(entry.name), _REPLACED.fullmatch(entry.name)
        match = committed or replaced
        if match:
            found.append((int(match[1]), committed is not None, entry.name, entry))
    return [entry for *_, entry in sorted(found, reverse=True)]


def _verify(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and ``run.json``, after every file was found well-formed and as the manifest says."""
    try:
        manifest = _manifest(path)
        document = b""
        for name, expected in manifest["files"].items():
            digest, content = _digest(path / name, keep=name == META)
            if digest != expected["sha256"]:
                raise Damaged(f"{path / name} is not the file that was written (its SHA-256 differs)")
            document = content if name == META else document
            if name.endswith(".safetensors"):
                check_header(path / name)
        meta = json.loads(document)
    except (OSError, ValueError, RecursionError) as e:
        raise Damaged(f"{path}: {e}") from e
    if not isinstance(meta, dict):
        raise Damaged(f"{path / META} does not describe a checkpoint")
    return manifest, meta


def _manifest(path: Path) -> dict[str, Any]:
    """What can be checked without reading the contents: names, kinds, sizes, the manifest itself."""
    if path.is_symlink() or not path.is_dir():
        raise Damaged(f"{path} is not a folder")
    present = _regular_files(path)
    if MANIFEST not in present:
        raise Damaged(f"{path} has no {MANIFEST}: writing or removing it was interrupted")
    if present.pop(MANIFEST) > MAX_MANIFEST:
        raise Damaged(f"{path / MANIFEST} is too large to be one")
    raw = (path / MANIFEST).read_bytes()
    manifest = _parse_manifest(path, raw)
    match = _COMMITTED.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    if match is None or int(match[1]) != manifest["step"]:
        raise Damaged(f"{path} holds step {manifest['step']}: it was renamed or copied")
    for name, expected in manifest["files"].items():
        if name not in present:
            raise Damaged(f"{path / name} is missing")
        if present[name] != expected["size"]:
            raise Damaged(f"{path / name} has {present[name]} bytes instead of {expected['size']}")
    extra = sorted(set(present) - set(manifest["files"]))
    if extra:
        raise Damaged(f"{path / extra[0]} does not belong to the checkpoint")
    return manifest


def _regular_files(path: Path) -> dict[str, int]:
    """Sizes by name. Hidden plain files (a file manager's, a network drive's) are never read."""
    sizes = {}
    for entry in path.iterdir():
        status = entry.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{entry} is not a plain file")
        if not entry.name.startswith("."):
            sizes[entry.name] = status.st_size
    return sizes


def _parse_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
        body = {k: v for k, v in manifest.items() if k != "seal"}
        intact = _dump(_sealed(body)) == raw
        version = body["format"]
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise Damaged(f"{path / MANIFEST} is damaged") from None
    if not intact:
        raise Damaged(f"{path / MANIFEST} was altered")
    if version != FORMAT:
        raise Damaged(f"{path} has format {version}; this version of metier reads {FORMAT}")
    if not _well_formed(body):
        raise Damaged(f"{path / MANIFEST} does not list a checkpoint's files")
    return body


def _well_formed(body: dict[str, Any]) -> bool:
    listed = body.get("files")
    if type(body.get("step")) is not int or type(body.get("finite")) is not bool or not isinstance(listed, dict):
        return False
    return META in listed and all(
        _FILE.fullmatch(name) and name != MANIFEST and isinstance(e, dict)
        and type(e.get("size")) is int and isinstance(e.get("sha256"), str)
        for name, e in listed.items()
    )  # fmt: skip


def _digest(path: Path, *, keep: bool) -> tuple[str, bytes]:
    """SHA-256 and, with ``keep``, the very bytes that were hashed. A link is not followed."""
    sha, kept = hashlib.sha256(), []
    with FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
        for block in _blocks(file):
            sha.update(block)
            if keep:
                kept.append(block)
    return sha.hexdigest(), b"".join(kept)


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 22):
        yield block


# --- rotation -----------------------------------------------------------------------------------------------


def rotate(root: Path, keep: int) -> list[Path]:
    """Remove all checkpoints but the newest ``keep`` complete ones and the newest complete finite one.

    Incomplete ones do not count towards ``keep``; those older than what is kept go too. Nothing is removed
    unless a checkpoint that stays was verified just now. Returns what was removed; a folder that cannot be
    removed is left for the next time.
    """
    keep = max(keep, 1)
    candidates = _candidates(Path(root))
    complete = [(p, m["finite"]) for p in candidates if (m := _manifest_or_none(p)) is not None]
    while complete and not _complete(complete[0][0]):
        complete.pop(0)
    if len(complete) < keep:
        return []
    newest = complete[0][0]
    healthy = next((p for p, finite in complete if finite and (p == newest or _complete(p))), None)
    stay = {p for p, _ in complete[:keep]} | {healthy}
    older = candidates[candidates.index(complete[keep - 1][0]) + 1 :]
    return [path for path in older if path not in stay and _remove(path)]


def _remove(path: Path) -> bool:
    """The manifest goes first, so that what an interruption leaves is no checkpoint."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        if (path / MANIFEST).exists():
            files.unlink(path / MANIFEST)
            files.fsync_folder(path)
        files.rmtree(path)
    except OSError:
        return False
    return True


def _manifest_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return _manifest(path)
    except (Damaged, OSError):
        return None


def _complete(path: Path) -> bool:
    try:
        _verify(path)
    except Damaged:
        return False
    return True
