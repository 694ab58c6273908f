"""``check``: the contract of a part, then its paper's claim, re-tested and written down as a finding.

The experiment is a design file in ``metier/studies`` named like the part (``optimizer-muon.yaml``) or like the card's
study; without one, the part's claim is tested by the two-part shorthand on the lab model.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.catalog.status import code_hash
from metier.compare import design as designs
from metier.compare.design import Design
from metier.compare.results import ComparisonResult
from metier.compare.verdict import Verdict, judge
from metier.core import part
from metier.core.errors import UsageError, unknown
from metier.core.runfolder import write_json

STUDIES = Path(__file__).resolve().parents[1] / "studies"
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Checked:
    """What checking one part gave."""

    name: str
    contract: tuple[str, ...]
    """Names of the contract checks that passed."""
    verdict: Verdict | None
    """``None`` when there is no claim to test."""
    finding: Path | None
    claim: str = ""
    report: Path | None = None

    @property
    def word(self) -> str:
        """The verdict's word, or ``contract only``."""
        return self.verdict.word if self.verdict else "contract only"


def check(
    ref: str, *, seeds: int | None = None, study: bool = True, out: str | Path | None = None, quiet: bool = False
) -> Checked:
    """Check a part: contract suite, then (with ``study``) its study or claim; the finding is written into ``findings/``.

    ``seeds`` other than the design's gives a trial whose finding goes to ``out`` only. Raises ``UsageError`` for an
    unknown name, ``AssertionError`` when the contract is broken.
    """
    from metier.testing import check_part

    item = part.find(ref)
    try:
        contract = tuple(check_part(item.id))
    except AssertionError as e:
        raise AssertionError(f"the contract of {item.id} is broken: {e}") from e
    claim = part.load(item.id).__metier__.claim
    found = _design(item) if study else None
    if found is None:
        return Checked(item.id, contract, None, None, claim.text if claim else "")
    return _study(item, contract, found, claim, seeds, out, quiet)


def _study(
    item: part.Listing,
    contract: tuple[str, ...],
    design: Design,
    claim: Any,
    seeds: int | None,
    out: str | Path | None,
    quiet: bool,
) -> Checked:
    from metier.compare import report
    from metier.compare.api import compare

    trial = seeds is not None and seeds != design.seeds
    design = design if seeds is None else design.model_copy(update={"seeds": seeds})
    result, folder = compare(design, out=out, quiet=quiet)
    if not any(key in part.KINDS for arm in design.arms.values() for key in arm):
        # The arms differ in an option, or in hooks: what counts is the code of the part that is checked.
        result = result.model_copy(update={"code_hash": code_hash([item.path])})
    page = folder / "report.html"
    page.write_text(report.render(result), encoding="utf-8")
    verdict = next(v for v in judge(result) if v.arm == _arm(design, item))
    place = folder / "finding.json" if trial or not _checkout() else ROOT / "findings" / f"{item.id}.json"
    write_json(place, finding(item.id, claim, verdict, result))
    return Checked(item.id, contract, verdict, place, claim.text if claim else design.question, page)


def finding(id: str, claim: Any, verdict: Verdict, result: ComparisonResult) -> dict[str, Any]:
    """The record of a study: verdict first, then everything that a reader needs to repeat or doubt it."""
    return {
        "part": id,
        "claim": claim.text if claim else result.question,
        "paper_figure": claim.figure if claim else "",
        "verdict": verdict.word,
        "effect": verdict.effect,
        "interval": [verdict.low, verdict.high],
        "text": verdict.text,
        **_stored(result),
    }


def _stored(result: ComparisonResult) -> dict[str, Any]:
    data = result.model_dump(mode="json")
    for run in data["runs"]:
        run.pop("folder", None)
        run["curve"] = _thinned(run["curve"])
    return data


def keep_leaderboard(result: ComparisonResult) -> Path:
    """Store the comparison of many parts under ``findings/leaderboard/``, named like their kind or factor."""
    kind = next(iter(result.arms[0].overrides))
    question = result.question or f"Which {kind} does best?"
    place = ROOT / "findings" / "leaderboard" / f"{kind}.json"
    data = _stored(result)
    for run in data["runs"]:
        if run["trial"] is not None:  # of trials only the tuned value and its result are shown
            run["curve"], run["eval_curve"] = {k: [] for k in run["curve"]}, None
    write_json(place, {**data, "claim": question})
    return place


def _thinned(curve: dict[str, list], points: int = 40) -> dict[str, list]:
    stride = max(1, len(curve["step"]) // points)
    return {k: v[::-1][::stride][::-1] for k, v in curve.items()}


def _design(item: part.Listing) -> Design | None:
    path = STUDIES / f"{item.id.replace('/', '-')}.yaml"
    if path.is_file():
        return designs.load(path)[0]
    claim = part.load(item.id).__metier__.claim
    testable = claim is not None and (item.kind == "hook" or claim.against.startswith(f"{item.kind}/"))
    if not testable or item.kind not in designs.BASES:
        return None
    return designs.shorthand([item.id])


def _arm(design: Design, item: part.Listing) -> str:
    """The arm that uses the part."""
    arms = [a for a in design.arms if a != design.control]
    named = [a for a in arms if item.name in (a, *_words(design.arms[a]))]
    return named[0] if named else arms[0]


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        yield value


def _checkout() -> bool:
    return (ROOT / "pyproject.toml").is_file()


def stalest(kind: str | None = None) -> list[part.Listing]:
    """Parts with a study, those without a current finding first, then by the age of their finding."""

    def age(item: part.Listing) -> float:
        path = ROOT / "findings" / f"{item.id}.json"
        return path.stat().st_mtime if path.is_file() else 0.0

    found = [i for i in part.listing() if (kind is None or i.kind == kind) and _design(i) is not None]
    return sorted(found, key=age)


def check_all(minutes: float, *, each: Callable[[Checked], None], kind: str | None = None) -> list[Checked]:
    """Check what fits into ``minutes``, stalest first; ``each`` is told as they finish."""
    if kind is not None and kind not in part.KINDS:
        raise unknown("kind", kind, part.KINDS)
    began, done = time.monotonic(), []
    longest = 0.0
    for item in stalest(kind):
        left = 60 * minutes - (time.monotonic() - began)
        if left <= longest:
            break
        started = time.monotonic()
        done.append(check(item.id, quiet=True))
        longest = max(longest, time.monotonic() - started)
        each(done[-1])
    if not done:
        raise UsageError(f"nothing to check fits into {minutes:g} minutes")
    return done
