"""Every row checked before anything is trained: what is wrong and where, repeats, labels, lengths."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from metier.core.data import formats
from metier.core.data.examples import BadRow, Example, Judged, Labelled, Message
from metier.core.data.readers import Problems
from metier.core.data.rows import Rows

NOT_TEXT = ("id", "meta", "label", "margin", "scores", "unfinished")


@dataclass
class Report:
    """What a check found; ``ok`` when every row can be used."""

    name: str
    format: str
    explanation: str
    rows: int = 0
    examples: int = 0
    barren: int = 0
    """Rows that are well-formed but hold nothing to compare."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Place and reason of every bad row."""
    duplicates: int = 0
    """Examples equal to an earlier one."""
    duplicate_ids: dict[str, int] = field(default_factory=dict)
    """Values of the rows' own ``id`` that occur more than once, with their number."""
    labels: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    """Characters per part of the example: least, median, 95th percentile, most."""
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every row can be used, and there is at least one example."""
        return not self.problems and self.examples > 0

    def json(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self) | {
            "ok": self.ok,
            "problems": [{"where": w, "reason": r} for w, r in self.problems],
        }


def check_rows(rows: Rows, format: str = "auto", problems: Problems | None = None) -> Report:
    """Check all ``rows``; ``problems`` are the rows that could not even be read.

    Raises ``UsageError`` for an unknown format, or when ``auto`` recognises none.
    """
    explanation = f"{rows.name}: format {format}, as asked"
    if format == "auto":
        format, explanation = formats.detect(rows)
    formats.lookup(format)
    unread = problems.shown if problems else []
    report = Report(rows.name, format, explanation, rows=len(rows) + len(unread), notices=list(rows.notices))
    report.problems += unread
    found: list[Example] = []
    for i in range(len(rows)):
        try:
            made = formats.expand(rows[i], format, id=rows.id(i))
        except BadRow as e:
            report.problems.append((rows.where(i), str(e)))
            continue
        found += made
        report.barren += not made
    report.examples = len(found)
    report.duplicates = len(found) - len({_content(e) for e in found})
    report.duplicate_ids = _repeated(str(r["id"]) for r in rows if r.get("id") is not None)
    report.labels = _labels(found)
    report.lengths = _lengths(found)
    return report


def _content(example: Example) -> str:
    return repr({k: v for k, v in vars(example).items() if k not in ("id", "meta")})


def _repeated(ids: Iterable[str]) -> dict[str, int]:
    return {k: n for k, n in Counter(ids).most_common() if n > 1}


def _labels(found: list[Example]) -> dict[str, int]:
    counts = Counter(str(e.label).lower() if isinstance(e, Judged) else str(e.label)
                     for e in found if isinstance(e, Judged | Labelled))  # fmt: skip
    return dict(sorted(counts.items()))


def _lengths(found: list[Example]) -> dict[str, dict[str, float]]:
    values: dict[str, list[int]] = {}
    for example in found:
        for key, value in vars(example).items():
            if key not in NOT_TEXT and value is not None:
                values.setdefault(key, []).extend(_sizes(value))
    return {k: _spread(sorted(v)) for k, v in values.items() if v}


def _sizes(value: Any) -> list[int]:
    """Characters: of a string, of all messages together, or of each answer in a list."""
    if isinstance(value, str):
        return [len(value)]
    if value and isinstance(value[0], Message):
        return [sum(len(m.content) for m in value)]
    return [len(v) for v in value]


def _spread(ordered: list[int]) -> dict[str, float]:
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"min": ordered[0], "median": median(ordered), "p95": p95, "max": ordered[-1]}
