"""What the pages are made of, gathered once: parts, rows with their status, findings, the checkout."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.catalog.status import RowStatus, rows_status
from metier.core.errors import UsageError
from metier.core.part import KINDS, ROOT, Listing, listing

CHECKOUT = ROOT.parents[2]


@dataclass(frozen=True)
class Finding:
    """One committed result, as a page shows it."""

    name: str
    """Path under ``findings/`` without the suffix, such as ``optimizer/lion`` or ``study/soap``."""
    question: str
    sentences: tuple[str, ...]
    """One per verdict, each beginning with the word of the verdict."""
    facts: tuple[tuple[str, str], ...]
    """Label and value: budget, seeds, date, command."""
    parts: tuple[str, ...]
    """Ids of the parts that were compared."""


@dataclass(frozen=True)
class Facts:
    """Everything that the pages need."""

    root: Path
    parts: tuple[Listing, ...]
    statuses: tuple[RowStatus, ...]
    findings: tuple[Finding, ...]

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the parts that have a page."""
        return frozenset(p.id for p in self.parts)

    def findings_of(self, part: str) -> list[Finding]:
        """Findings about a part: its own, and those of comparisons that it took part in."""
        return [f for f in self.findings if f.name == part or part in f.parts]


def gather(root: Path | None = None) -> Facts:
    """The facts of a checkout (default: the one this package runs from). Raises ``UsageError`` elsewhere."""
    root = root or CHECKOUT
    if not (root / "docs").is_dir() or not (root / "recipes").is_dir():
        raise UsageError(f"{root} is not a checkout of metier: it has no docs and recipes", hint="Run this in a checkout.")
    builtin = tuple(p for p in listing() if Path(p.path).is_relative_to(ROOT))
    return Facts(root, builtin, tuple(rows_status()), tuple(_findings(root / "findings")))


def _findings(folder: Path) -> Iterator[Finding]:
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            yield read_finding(name, json.loads(path.read_bytes()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            yield Finding(name, "", (f"This file cannot be read: {str(e).splitlines()[0]}",), (), ())


def read_finding(name: str, data: dict[str, Any]) -> Finding:
    """A stored comparison or study as a finding. Raises ``ValueError`` when it is none."""
    if "study" in data:
        return _study(name, data)
    from metier.compare import verdict

    result = read_result(data)
    sentences = tuple(f"**{v.word}** — {v.text}" for v in verdict.judge(result))
    facts = [
        ("metric", f"{result.metric}, {'lower' if result.lower_is_better else 'higher'} is better"),
        ("budget", f"{result.budget.amount:,.0f} {result.budget.kind} for every run"),
        ("seeds", ", ".join(map(str, result.seeds))),
        ("smallest effect that counts", f"{result.minimum_effect:g}"),
        ("made", result.created[:10]),
        *(("command", f"`{c}`") for c in result.commands),
        *(("note", n) for n in result.notes),
    ]
    return Finding(name, result.question, sentences, tuple(facts), tuple(dict.fromkeys(_compared(result))))


def read_result(data: dict[str, Any]) -> Any:
    """The comparison inside a stored finding. Raises ``ValueError`` when there is none."""
    from metier.compare.results import ComparisonResult

    known = {k: v for k, v in data.items() if k in ComparisonResult.model_fields}
    return ComparisonResult.model_validate_json(json.dumps(known))


def _study(name: str, data: dict[str, Any]) -> Finding:
    sentences = [f"**{data['verdict']}** — {data['text']}"]
    for c in data["checks"]:
        sentences.append(f"{'✓' if c['holds'] else '✗'} {c['text']}: expected {c['expected']}, seen {_seen(c['observed'])}")
    facts = [
        ("made", f"{data['created'][:10]}, in {data['seconds'] / 60:.0f} minutes"),
        *(("command", f"`{c}`") for c in data["commands"]),
        *(("note", n) for n in data["notes"]),
    ]
    return Finding(name, f"{data['claim']} {data['method']}", tuple(sentences), tuple(facts), tuple(data["parts"]))


def _seen(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _compared(result: Any) -> Iterator[str]:
    for arm in result.arms:
        for kind, ref in arm.overrides.items():
            if kind in KINDS and ref:
                named = ref if isinstance(ref, str) else next(iter(ref))
                yield f"{kind}/{named.split('/')[-1].replace('_', '-').lower()}"
