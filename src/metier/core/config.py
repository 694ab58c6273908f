"""The run file: every key typed, every unknown key an error with its line and the nearest valid name."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metier.core.errors import UsageError, unknown
from metier.core.part import Count, Fraction, Index, Positive
from metier.core.yamlfile import PART_KEYS, Document, Path_, override, read

PartRef = str | dict[str, dict[str, Any] | None]


class Strict(BaseModel):
    """Base of all sections: unknown keys refused, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Strict):
    """What a run reads."""

    train: str | dict[str, str]
    """A file, folder, hub id or ``lab/…`` name; or several as ``{name: where}`` for a source that mixes them."""
    eval: str | None = None
    """Held-out data of the same format. Without it they come from ``train``: its ``eval_split``, or an ``eval_fraction``."""
    eval_split: str | None = None
    """Split of the hub data used for held-out; without ``eval`` the held-out data come from ``train``'s data set."""
    eval_fraction: Fraction = 0.0
    eval_limit: Count | None = 200
    """At most this many held-out examples are evaluated, chosen once at random."""
    format: str = "auto"
    """``auto`` detects and says what it found; ``metier data check`` lists the formats."""
    columns: dict[str, str] = Field(default_factory=dict)
    """``{expected: yours}`` for data whose keys have other names."""
    split: str | None = None
    """Split of a hub data set or folder to train on."""
    limit: Count | None = None
    """Train on the first rows only."""
    max_length: Count = 1024
    """Longest sequence in tokens; block length when ``chunk`` is on."""
    truncate: Literal["error", "drop", "right", "left-prompt"] = "drop"
    on_bad: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used (a missing key, equal answers, a score that is not a number): list them and
    stop, or leave them out and say how many and which."""
    on_empty: Literal["error", "drop"] = "drop"
    """What to do with an example none of whose tokens carries loss; drops are counted and said."""
    chunk: bool = False
    """Concatenate plain text and cut it into blocks of ``max_length`` (pre-training)."""
    packed: bool = False
    """Several sequences per row, each seeing only itself."""
    prompt_once: bool = True
    """Compute a prompt once for all of its answers; otherwise, and for models that cannot, each answer has a copy of it."""
    shuffle: bool = True
    source: PartRef | None = None
    """A part that mixes, conditions or makes examples."""


class BatchRamp(Strict):
    """A batch that grows: from ``start`` in equal stretches by ``increment`` to ``train.batch``."""

    start: Count
    increment: Count
    examples: Count
    """Consumed when the full batch is reached."""


class Train(Strict):
    """How long, how large, how careful."""

    steps: Count | None = None
    epochs: Positive | None = None
    tokens: Count | None = None
    """Length of the run in real tokens, turned into steps from the mean length of the examples."""
    batch: Count = 8
    """Sequences, pairs or examples per optimizer step, over all processes."""
    batch_ramp: BatchRamp | None = None
    """Begin with smaller batches; a function of the examples consumed, so it survives a resume."""
    micro_batch: Count | None = None
    """Of these, how many are computed at once; the update is the same for any value."""
    clip: Positive | None = 1.0
    """Largest global gradient norm."""
    seed: Index = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` computes in bfloat16 by autocast; weights and optimizer state stay in fp32."""
    attention: Literal["auto", "sdpa", "segments", "flex", "eager"] = "auto"
    """How attention is computed. Where several sequences share a row, ``auto`` is ``flex`` on CUDA and ``segments`` elsewhere."""
    gradient_checkpointing: bool = False
    device: str = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes; ``auto`` is ``ddp``."""
    workers: Annotated[int, Ge(0)] = 0
    """Threads that prepare batches ahead; the order never changes."""
    eval_every: Count | None = None
    """In steps; evaluation also happens at the end when there is held-out data."""
    save_every: Count | None = None
    """In steps; a last checkpoint is always written."""
    keep: Count = 2
    """Checkpoints kept. The newest with finite weights is never removed."""
    log_every: Count = 1
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: Count = 5
    """With ``skip``: stop after this many skipped steps in a row."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """Stop cleanly after this much training time."""


class Run(Strict):
    """One training run."""

    model: str
    """A ``lab/…`` name, a short name, a folder, or a hub id."""
    data: Data
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights in memory."""
    transform: list[PartRef] = Field(default_factory=list)
    """Model parts applied in order before the adapter."""
    adapter: PartRef | None = None
    objective: PartRef = "lm"
    reference: str | None = None
    """Reference model for objectives that need one; default: the model at the start (adapter off)."""
    reference_scores: str = "live"
    """``live`` runs the reference model in every step; ``cached`` runs it once over all data before training and keeps the scores
    in the user's cache folder; anything else names a folder to keep them in."""
    optimizer: PartRef = "adamw"
    schedule: PartRef = "cosine"
    hooks: list[PartRef] = Field(default_factory=list)
    train: Train = Field(default_factory=Train)
    out: str | None = None
    """Run folder; default ``runs/<name of the run file>``."""
    sinks: list[str] = Field(default_factory=list)
    """Trackers to copy the metrics to, such as ``tensorboard``."""


def load(run: str | Path | Mapping[str, Any] | Run, overrides: Iterable[str] = ()) -> tuple[Run, Document]:
    """A validated ``Run`` and the document that knows where each key stands."""
    if isinstance(run, Run):
        document = Document(run.model_dump(exclude_unset=True))
    elif isinstance(run, Mapping):
        document = Document({k: v for k, v in run.items()})
    else:
        document = read(run)
    document.defaults = {k: f.default for k, f in Run.model_fields.items() if isinstance(f.default, str) and k in PART_KEYS}
    override(document, overrides)
    return validate(Run, document), document


def validate(model: type[Strict], document: Document, base: Path_ = ()) -> Any:
    """Validate ``document`` against a section model; the first problem becomes a ``UsageError`` with its place."""
    try:
        return model.model_validate(document.data, strict=True)
    except ValidationError as e:
        problem = min(e.errors(), key=lambda p: p["type"] != "extra_forbidden")
        raise _usage_error(model, document, problem) from None


def _usage_error(model: type[Strict], document: Document, problem: Any) -> UsageError:
    path = tuple(p for p in problem["loc"] if not _is_union_tag(p))
    where = document.where(path)
    if problem["type"] == "extra_forbidden":
        section = _section(model, path[:-1])
        name = ".".join(map(str, path[:-1])) or "the run file"
        return unknown(f"key in {name}", str(path[-1]), section.model_fields, where=where)
    if problem["type"] == "missing":
        return UsageError(f"{'.'.join(map(str, path))} is required", where=document.where(path[:-1]))
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return UsageError(f"{path[-1] if path else ''} = {problem['input']!r}: {message}", where=where)


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (part in ("str", "int", "float") or "[" in part)


def _section(model: type[Strict], path: Path_) -> type[Strict]:
    for key in path:
        field = model.model_fields.get(str(key))
        inner = field.annotation if field else None
        if isinstance(inner, type) and issubclass(inner, Strict):
            model = inner
    return model


def place(document: Document, *path: str | int) -> Callable[[str], str]:
    """``where`` for :func:`metier.core.part.build`: option name -> place in the user's file."""

    def where(option: str) -> str:
        node: Any = document.data
        for key in path:
            node = node[int(key)] if isinstance(node, list) else node.get(key, {})
        name = next(iter(node)) if isinstance(node, Mapping) and len(node) == 1 else None
        full = (*path, *(p for p in (name, option) if p))
        return document.where(full)

    return where
