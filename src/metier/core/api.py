"""``train``: a run from its file to its result."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metier.core import config
from metier.core.config import Run


@dataclass(frozen=True)
class Result:
    """What a finished (or interrupted) run leaves."""

    folder: Path
    status: str
    """``done``, ``ended`` (data or time ran out) or ``interrupted`` (a complete checkpoint was written)."""
    step: int
    metrics: dict[str, float]
    events: list[dict[str, Any]] = field(repr=False, default_factory=list)
    signal: int | None = None
    flops: float = 0.0
    """Matrix-product FLOPs of the whole run, counted on one step; 0 when not asked for."""
    peak_bytes: int = 0
    state_bytes: int = 0
    """Optimizer state."""
    params: int = 0
    """Trainable parameters."""
    main: bool = True
    """Whether this is the process that writes and speaks (several processes return a result each)."""


def train(
    run: str | Path | Mapping[str, Any] | Run,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    quiet: bool = False,
    resume: bool = True,
    keep_weights: bool = True,
    handle_signals: bool = True,
    count_flops: bool = False,
) -> Result:
    """Train.

    ``run`` is a run file, a mapping with the same keys, or a :class:`~metier.core.config.Run`; ``overrides`` are
    ``key=value`` strings. A folder that holds a complete checkpoint of the same run is continued; ``resume=False``
    starts afresh. ``keep_weights=False`` leaves only the record and the metrics (comparisons use it);
    ``count_flops`` counts the FLOPs of the first step.

    Raises ``UsageError`` for a wrong request before any model is loaded where that is possible, ``NonFiniteError``
    when a loss or gradient is not finite (the weights are untouched).
    """
    from metier.core.session import open_session

    settings, document = config.load(run, overrides)
    name = Path(run).stem if isinstance(run, str | Path) else "run"
    folder = Path(out or settings.out or Path("runs") / name)
    with open_session(settings, document, folder, quiet=quiet, fresh=not resume, handle_signals=handle_signals) as session:
        session.count_flops = count_flops
        result = session.train(keep_weights=keep_weights)
    if not keep_weights:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result
