"""Studies of a card: several predictions checked together, written down as one finding.

``metier/studies/<card>.py`` holds ``PARTS`` (whose code the study is about), ``CLAIM`` (the sentence of the paper that is
tested) and ``run(study) -> Outcome``. What a study trains is kept in its folder, so an interrupted one goes on; what other code
left there is set aside (``compare/kept.py``), so all figures of a finding are of the code that it names.
"""

import importlib
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from metier.catalog.status import code_hash
from metier.compare.kept import kept, sources, stamp
from metier.compare.results import ComparisonResult
from metier.core import part
from metier.core.errors import unknown
from metier.core.runfolder import command_line, environment, finite, write_json

HOME = Path(__file__).resolve().parents[1] / "studies"
ROOT = Path(__file__).resolve().parents[3]
Word = Literal["holds", "partly", "against"]
CHANGED = "The code that the figures depend on was changed while the study ran: run it again."


@dataclass(frozen=True)
class Check:
    """One prediction, fixed before the run, and what was seen."""

    text: str
    expected: str
    """As the card words it, with its margin."""
    observed: Any
    """A number, a short text, or a list of numbers; JSON-able."""
    holds: bool


@dataclass(frozen=True)
class Outcome:
    """What a study saw."""

    checks: Sequence[Check]
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Everything a reader needs to repeat or doubt the checks; JSON-able."""
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> Word:
        """``holds`` when every check does, ``against`` when none does, else ``partly``."""
        held = sum(c.holds for c in self.checks)
        return "holds" if held == len(self.checks) else "partly" if held else "against"

    @property
    def text(self) -> str:
        """One sentence for people."""
        failed = [f"{c.text} (expected {c.expected}, seen {_short(c.observed)})" for c in self.checks if not c.holds]
        held = f"{len(self.checks) - len(failed)} of {len(self.checks)} predictions held."
        return held if not failed else f"{held} Not: {'; '.join(failed)}."


@dataclass(frozen=True)
class Study:
    """What a study may use."""

    folder: Path
    quick: bool = False
    """Tiny sizes: does it run at all?"""
    quiet: bool = False

    def compare(self, design: Mapping[str, Any], name: str) -> ComparisonResult:
        """Run a comparison in the study's folder; finished runs of an earlier start are kept."""
        from metier.compare.api import compare

        return compare({**design, "name": name}, out=self.folder / name, quiet=self.quiet)[0]

    def train(self, run: Mapping[str, Any], name: str) -> Any:
        """Train one run in the study's folder; continued where it was interrupted."""
        from metier.core.api import train

        return train(run, out=self.folder / name, quiet=True, handle_signals=False)


def names() -> list[str]:
    """Names of all studies."""
    return sorted(p.stem.replace("_", "-") for p in HOME.glob("*.py") if not p.stem.startswith("_"))


def run(name: str, *, quick: bool = False, folder: str | Path | None = None, quiet: bool = False) -> tuple[Outcome, Path]:
    """Run a study and write its finding: ``findings/study/<name>.json``, or the study's folder when ``quick``.

    Raises ``UsageError`` for an unknown name.
    """
    module = load(name)
    where = Path(folder or Path("comparisons") / "study" / (f"{name}-quick" if quick else name))
    code, about = _code(module, quick), _about(module)
    with kept(where, code, own=folder is None, quiet=quiet) as used:
        outcome: Outcome = module.run(Study(where, quick, quiet))
    if _code(module, quick) != code:
        outcome = replace(outcome, notes=[*outcome.notes, CHANGED])
    place = ROOT / "findings" / "study" / f"{name}.json"
    if quick or not (ROOT / "pyproject.toml").is_file():
        place = where / "finding.json"
    write_json(place, record(name, module, outcome, used.seconds, about))
    return outcome, place


def _code(module: Any, quick: bool) -> str:
    """A hash of all that the figures of a study depend on."""
    parts = [Path(part.find(p).path) for p in module.PARTS]
    return stamp(sources([Path(inspect.getfile(module)), *parts]), quick)


def _about(module: Any) -> str:
    """A hash of the parts a finding is about."""
    return code_hash(part.find(p).path for p in module.PARTS)


def load(name: str) -> Any:
    """The module of a study. Raises ``UsageError`` for an unknown name."""
    if name not in names():
        raise unknown("study", name, names())
    return importlib.import_module(f"metier.studies.{name.replace('-', '_')}")


def record(name: str, module: Any, outcome: Outcome, seconds: float, about: str) -> dict[str, Any]:
    """The finding of a study, as it is stored: ``seconds`` of all calls, ``about`` the hash of its parts when it began."""
    found = {
        "study": name, "claim": module.CLAIM, "verdict": outcome.verdict, "text": outcome.text,
        "checks": [asdict(c) for c in outcome.checks], "figures": dict(outcome.figures), "notes": list(outcome.notes),
        "parts": list(module.PARTS), "method": (module.__doc__ or "").strip(), "seconds": round(seconds),
        "environment": environment(), "commands": [" ".join(command_line())],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "code_hash": about,
    }  # fmt: skip
    return finite(found)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
