"""A comparison's design: arms that differ in one named factor, an equal budget, equal tuning, paired seeds."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from metier.compare import text
from metier.core import config, part
from metier.core.config import Strict
from metier.core.errors import UsageError, unknown
from metier.core.part import Claim, Count, NonNegative, Positive
from metier.core.yamlfile import PART_KEYS, Document, override, read, set_path

FIXED = ("data", "train.seed", "train.steps", "train.epochs", "train.tokens", "train.batch", "train.eval_every", "out", "sinks")
"""What no arm may change unless the design names it as its factor: it would make the comparison unfair."""


class Tune(Strict):
    """Every arm's own search, of equal size: the factor times each arm's own starting value."""

    option: str = "optimizer.lr"
    factors: list[Positive] = Field(default_factory=lambda: [0.3, 1.0, 3.0])
    """Multiples of the arm's own value of the option; their number is the number of trials, the same for every arm."""
    fraction: Positive = 1.0
    """Length of a trial relative to a final run."""
    widen: NonNegativeInt = 0
    """Most further values of an arm, beyond the end of the grid at which its best value lies, by the grid's own factor."""


class Design(Strict):
    """A comparison file."""

    name: str | None = None
    question: str = ""
    base: str | None = None
    """A run file that all arms start from, relative to this file; or give ``run``."""
    run: dict[str, Any] | None = None
    arms: dict[str, dict[str, Any]]
    """Arm name -> overrides (``optimizer: {...}`` or dotted keys)."""
    control: str
    factor: str = "optimizer"
    """The one top-level key (or dotted key) in which arms may differ."""
    budget: dict[Literal["tokens", "flops", "seconds"], Positive] = Field(default_factory=dict)
    """One entry; without it every arm trains as long as the run file says."""
    tune: Tune | None = Field(default_factory=Tune)
    seeds: Count = 3
    metric: str = "eval_loss"
    also: list[str] = Field(default_factory=list)
    """Further metrics of the final runs to keep and show."""
    lower_is_better: bool = True
    minimum_effect: NonNegative = 0.0
    """What the claim asks for, in units of the metric."""
    parallel: Count | None = None
    """Runs at a time; default: one per core."""
    out: str | None = None
    """Folder; default ``comparisons/<name>``."""


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> tuple[Design, Document]:
    """Read and check a design. Raises ``UsageError`` with file and line."""
    if isinstance(source, Mapping):
        document = Document(dict(source), "design")
        folder = Path()
    else:
        document = read(source)
        folder = Path(source).parent
        document.data.setdefault("name", Path(source).stem)
    override(document, overrides)
    design: Design = config.validate(Design, document)
    _check(design, document)
    if design.base:
        design = design.model_copy(update={"base": str(folder / design.base)})
    return design, document


def _check(design: Design, document: Document) -> None:
    if design.control not in design.arms:
        raise unknown("control arm", design.control, design.arms, where=document.where(("control",)))
    if len(design.arms) < 2:
        raise UsageError("a comparison needs at least two arms", where=document.where(("arms",)))
    if len(design.budget) > 1:
        raise UsageError("budget takes one of tokens, flops, seconds", where=document.where(("budget",)))
    if design.tune and design.tune.widen and len(set(design.tune.factors)) < 2:
        raise UsageError("tune.widen needs at least two different factors", where=document.where(("tune",)))
    if (design.base is None) == (design.run is None):
        raise UsageError("give either base: RUN.yaml or run: {…}", where=document.where(()))
    for arm, overrides in design.arms.items():
        for key in overrides:
            if key != design.factor and not key.startswith(f"{design.factor}."):
                raise UsageError(
                    f"arm {arm!r} changes {key!r}, but this comparison's factor is {design.factor!r}",
                    where=document.where(("arms", arm, key)),
                    hint="Arms may differ in the named factor only; put shared settings in run, or set factor.",
                )


def run_document(design: Design, arm: str) -> Document:
    """The run file of one arm: the base with the arm's overrides."""
    document = read(design.base) if design.base else Document(_copy(design.run or {}), "design")
    for key, value in design.arms[arm].items():
        set_path(document, tuple(key.split(".")), _copy(value), f"arm {arm}: {key}")
    return document


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def shorthand(parts: list[str], *, seeds: int | None = None, changes: Iterable[str] = ()) -> Design:
    """The design of ``metier compare optimizer/lion optimizer/adamw``: the last part is the control, on the lab model.

    With a claim on the first part that names its control, that control is added when it is missing. ``optimizer/*`` is
    every part of the kind, against the one that the lab's run uses. Hooks are compared with a run without any.
    """
    items = [i for p in parts for i in _expand(p)]
    kinds = {i.kind for i in items}
    if len(kinds) != 1:
        raise UsageError(f"parts of one kind are compared; these are {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind not in BASES:
        raise unknown("kind to compare by name", kind, BASES, more="Write a design file for other kinds.")
    claim: Claim | None = None if parts[0].endswith("/*") else part.load(items[0].id).__metier__.claim
    names = list(dict.fromkeys(i.name for i in items))
    control = _control(kind, names, claim, everything=parts[0].endswith("/*"))
    names = [n for n in names if n != control] + [control]
    factor = "hooks" if kind == "hook" else kind
    claimed = {"metric": claim.metric, "lower_is_better": claim.lower_is_better} if claim else {}
    design = {
        "name": "-vs-".join(names) if len(names) < 5 else f"{kind}-all",
        "question": claim.text if claim else f"Which {kind} does best here?",
        "run": _copy(BASES[kind]), "factor": factor, "control": control,
        "arms": {n: {factor: _reference(kind, n)} for n in names},
        "minimum_effect": claim.minimum_effect if claim else 0.0, **METRICS.get(kind, {}), **claimed,
        "tune": LAB_TUNE.get(kind), **({"seeds": seeds} if seeds else {}),
    }  # fmt: skip
    return load(design, changes)[0]


def _control(kind: str, names: list[str], claim: Claim | None, *, everything: bool) -> str:
    """Name of the control arm of a comparison by part names."""
    if kind == "hook":
        return NO_HOOK
    if claim and claim.against.startswith(f"{kind}/"):
        return part.find(claim.against).name
    return part.split_ref(BASES[kind][kind], kind)[0] if everything else names[-1]


def _reference(kind: str, name: str) -> Any:
    """How a run file names the part."""
    if name == NO_HOOK:
        return []
    ref = {name: dict(LAB_OPTIONS.get(kind, {}))}
    return [ref] if kind == "hook" else ref


def part_refs(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``(kind, reference)`` of every part that a run file, or an arm's changes to one, names."""
    for key, ref in overrides.items():
        if key in PART_KEYS and ref:  # ``model`` is a kind too, but in a run file it names a model
            yield key, ref
        elif key in LISTS:
            yield from ((LISTS[key], r) for r in ref or ())
        elif key == "data.source" and ref:
            yield "source", ref
        elif key == "data" and isinstance(ref, Mapping) and ref.get("source"):
            yield "source", ref["source"]


def _expand(pattern: str) -> list[part.Listing]:
    if pattern.endswith("/*"):
        kind = pattern[:-2]
        found = [i for i in part.listing() if i.kind == kind]
        if not found:
            raise unknown("kind", kind, part.KINDS)
        return [i for i in found if _fits(i)]
    return [part.find(pattern)]


def _fits(item: part.Listing) -> bool:
    """Whether a part can be compared with all others of its kind: an objective must learn from given answers alone."""
    if item.kind != "objective":
        return True
    from metier.core.batch import Lists, Pairs, Rated
    from metier.core.lossmodule import batch_type

    obj = part.load(item.id)
    if any(o.required for o in part.options(obj).values()):
        return False
    built = part.build("objective", item.name)
    if getattr(obj, "traits", {}).get("policy", ("off",))[0] == "on":
        return False
    return batch_type(built.obj) in (Pairs, Rated, Lists) and "samples" not in built.needs and built.takes is None


LAB_REWARD = {"python": {"function": "metier.lab.judges:quality"}}
_LAB_RUN: dict[str, Any] = {
    "model": "lab/llama-1m",
    "data": {"train": "lab/python", "eval_fraction": 0.05, "eval_limit": 64, "chunk": True, "max_length": 128},
    "schedule": {"cosine": {"warmup": 0.1}},
    "optimizer": {"adamw": {"lr": 3e-3}},
    "train": {"steps": 60, "batch": 32, "log_every": 1},
}
_LEADERBOARD_RUN: dict[str, Any] = {
    **_LAB_RUN,
    "model": "lab/llama-300k",
    "data": {**_LAB_RUN["data"], "eval_limit": 32},
    "train": {"steps": 100, "batch": 16, "eval_every": 10, "log_every": 1},
}
"""Small enough that two dozen optimizers, each tuned, take a coffee break on two cores."""
_PREFERENCE_RUN: dict[str, Any] = {
    "model": "lab/words-sft",
    "data": {"train": "lab/preferences", "eval": "lab/preferences-held-out", "max_length": 64},
    "objective": "dpo",
    "schedule": {"cosine": {"warmup": 0.1}},
    "optimizer": {"adamw": {"lr": 1e-3, "weight_decay": 0.0}},
    "hooks": [{"answers": {"prompts": "lab/preferences-held-out", "reward": LAB_REWARD, "limit": 64, "max_new_tokens": 24}}],
    "train": {"steps": 120, "batch": 32, "micro_batch": 32, "log_every": 40},
}
"""A fine-tuned model of a small language, pairs labelled by a known reward, and that reward for its answers."""
BASES: dict[str, dict[str, Any]] = {
    "objective": _PREFERENCE_RUN,
    "optimizer": _LEADERBOARD_RUN,
    "schedule": _LAB_RUN,
    "hook": _LAB_RUN,
}
"""What parts of a kind are compared on when no design file says."""
METRICS: dict[str, dict[str, Any]] = {
    "objective": {
        "metric": "answer_reward", "lower_is_better": False,
        "also": ["answer_pair_accuracy", "answer_kl", "answer_length", "answer_win_rate"],
    },
}  # fmt: skip
"""What parts of a kind are compared by, where it is not the loss on held-out data: losses of two objectives say nothing."""
LISTS = {"hooks": "hook", "transform": "model"}
"""Keys of a run file that list parts, and the kind of these."""
LAB_TUNE: dict[str, dict[str, Any]] = {
    "objective": {"factors": [0.3, 1.0, 3.0], "fraction": 0.5, "widen": 4},
    "optimizer": {"factors": [0.3, 1.0, 3.0, 10.0, 30.0, 100.0]},  # default rates are meant for larger models than the lab's
    "hook": {"factors": [0.3, 1.0, 3.0]},
}
NO_HOOK = "none"
"""Name of the arm without hooks."""
LAB_OPTIONS: dict[str, dict[str, Any]] = {"optimizer": {"weight_decay": 0.1}}
"""Options that every part of a kind gets, where some do nothing without them."""


def grid(design: Design, arm: str, document: Document) -> list[float]:
    """The values tried for one arm: its own starting value times the factors."""
    if design.tune is None:
        return []
    start = get_option(document, design.tune.option)
    if not isinstance(start, int | float):
        raise UsageError(f"arm {arm!r} does not set {design.tune.option}, so there is nothing to tune around")
    if design.tune.widen and start <= 0:
        raise UsageError(f"arm {arm!r} starts at {design.tune.option} {start:g}; tune.widen needs a positive value to go on from")
    return [float(f"{start * f:.6g}") for f in design.tune.factors]


def get_option(document: Document, dotted: str) -> Any:
    """The value at a dotted key, stepping through part references; the part's own default where it is not set."""
    kind, *rest = dotted.split(".")
    node = document.data.get(kind)
    if kind in part.KINDS and node is not None:
        from metier.core.resolve import common_schema

        name, given = part.split_ref(node, kind)
        schema = {**common_schema(kind), **part.options(part.load(name, kind))}
        option = schema.get(rest[-1])
        if option is None:
            raise unknown(f"option of {kind}/{name}", rest[-1], schema)
        value = given.get(rest[-1], option.default)
        return _own_lr(node) if value is None and dotted == "optimizer.lr" else value
    for key in rest:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _own_lr(ref: Any) -> float:
    """The learning rate that an optimizer uses when none is given."""
    from metier.core.optim import default_lr
    from metier.core.resolve import bind

    return default_lr(bind("optimizer", ref).built.obj)


def jobs_count(design: Design) -> int:
    """Number of runs of a comparison, at least: trials and seeds of every arm."""
    trials = len(design.tune.factors) if design.tune else 0
    return len(design.arms) * (trials + design.seeds)


def most_jobs(design: Design) -> int:
    """Number of runs when every arm's search goes on to its cap."""
    return jobs_count(design) + len(design.arms) * (design.tune.widen if design.tune else 0)


def budget_line(design: Design) -> str:
    """What a comparison is going to run, for people."""
    arms, seeds = text.counted(len(design.arms), "arm"), text.counted(design.seeds, "seed")
    least, most = jobs_count(design), most_jobs(design)
    if not design.tune:
        return f"{arms} with {seeds} each: {text.counted(least, 'run')}"
    each = f"{arms} with {text.counted(len(design.tune.factors), 'trial')} and {seeds} each"
    if least == most:
        return f"{each}: {least} runs"
    goes_on = f"at most {design.tune.widen} further for an arm whose best {design.tune.option} is at an edge"
    return f"{each}, {goes_on}: {least} to {most} runs"
