"""What a comparison leaves behind: every run with its curves and costs, as data that survives JSON."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

FORMAT = 1
Status = Literal["done", "diverged", "crashed"]


def _read_number(value: Any) -> Any:
    return math.nan if value is None else value


def _write_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float, BeforeValidator(_read_number), PlainSerializer(_write_number, float | None)]
"""A float that may be NaN or infinite. Both are ``null`` in JSON, which is read as NaN."""
Finite = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A finite float, or ``None`` where there is none; a value that is not finite becomes ``None``."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Curve(_Data):
    """One measured quantity over a run: four lists of equal length."""

    step: list[int]
    """Optimizer steps done."""
    tokens: list[int]
    """Tokens seen so far."""
    seconds: list[Number]
    """Seconds of training so far, without evaluation."""
    value: list[Number]

    @model_validator(mode="after")
    def _lengths(self) -> "Curve":
        lengths = [len(self.step), len(self.tokens), len(self.seconds), len(self.value)]
        if len(set(lengths)) > 1:
            raise ValueError(f"step, tokens, seconds and value have lengths {lengths}")
        return self

    def __len__(self) -> int:
        return len(self.step)


class RunResult(_Data):
    """One training run: a tuning trial, or a final run of one arm on one seed."""

    arm: str
    seed: int
    trial: int | None
    """Index of the tuning trial; ``None`` for a final run."""
    options: dict[str, Any]
    """The tuned options and their values."""
    metric: Finite
    """Final value of the comparison's metric; ``None`` when the run failed."""
    status: Status
    error: str | None
    curve: Curve
    """Training loss of every logged step."""
    eval_curve: Curve | None
    """The comparison's metric at every evaluation."""
    seconds: float
    tokens: int
    flops: float
    peak_bytes: int
    state_bytes: int
    """Bytes of optimizer state."""
    params: int
    """Number of trained parameters."""
    also: dict[str, Finite] = Field(default_factory=dict)
    """Further final metrics that the design names."""
    folder: str = ""
    """Where it was trained; empty in a stored finding."""

    @property
    def failed(self) -> bool:
        """Whether the run has no final value: it crashed or diverged."""
        return self.status != "done" or self.metric is None


class Arm(_Data):
    """One side of a comparison."""

    name: str
    label: str
    overrides: dict[str, Any]
    is_control: bool


class Tuning(_Data):
    """One arm's search: the values tried and what each gave; ``None`` for a trial that failed."""

    arm: str
    parameter: str
    values: list[float]
    metric: list[Finite]
    best: float
    planned: int | None = None
    """How many of the values, the first ones, are the design's grid; ``None``: all, as in records from before ``widen``."""
    widen: int = 0
    """Most values that might follow the grid, while the best one was at an end of what had been tried."""

    @model_validator(mode="after")
    def _lengths(self) -> "Tuning":
        if len(self.values) != len(self.metric):
            raise ValueError(f"{len(self.values)} values but {len(self.metric)} metrics")
        return self

    @property
    def at_edge(self) -> bool:
        """Whether the best value is an end of what was tried, so that a better one may lie outside."""
        return len(self.values) > 1 and self.best in (min(self.values), max(self.values))

    @property
    def further(self) -> list[float]:
        """The values tried beyond the grid, in order."""
        return [] if self.planned is None else self.values[self.planned :]


class Budget(_Data):
    """What every arm may spend."""

    kind: Literal["tokens", "flops", "seconds"]
    amount: float


class ComparisonResult(_Data):
    """Everything a verdict, a table and a report are made of. Stored as ``comparison.json``."""

    format: int = FORMAT
    name: str
    question: str
    metric: str
    lower_is_better: bool
    budget: Budget
    minimum_effect: float
    """What the claim asks for, in units of the metric."""
    arms: list[Arm]
    seeds: list[int]
    tuning: list[Tuning]
    runs: list[RunResult]
    environment: dict[str, Any]
    commands: list[str]
    created: str
    """UTC, ISO 8601."""
    code_hash: str
    notes: list[str] = Field(default_factory=list)

    @property
    def widen(self) -> int:
        """Most trials beyond the grid that an arm's search might take; the same for every arm."""
        return max((t.widen for t in self.tuning), default=0)

    @property
    def control(self) -> Arm:
        """The arm that the others are compared with."""
        return next(a for a in self.arms if a.is_control)

    @property
    def challengers(self) -> list[Arm]:
        """The arms that are not the control."""
        return [a for a in self.arms if not a.is_control]

    def finals(self, arm: str) -> list[RunResult]:
        """The final runs of one arm, in the order of the seeds."""
        found = [r for r in self.runs if r.arm == arm and r.trial is None]
        return sorted(found, key=lambda r: self.seeds.index(r.seed) if r.seed in self.seeds else r.seed)

    @model_validator(mode="after")
    def _one_control(self) -> "ComparisonResult":
        controls = [a.name for a in self.arms if a.is_control]
        if len(controls) != 1:
            raise ValueError(f"exactly one arm is the control, not {controls}")
        return self
