"""A comparison's result in the terminal: a table, one sentence per verdict, the notes."""

import sys
from typing import Any

from metier.compare import stats, text, verdict
from metier.compare.results import ComparisonResult
from metier.compare.verdict import Verdict

STYLES = {"holds": "bold green", "direction": "cyan", "unclear": "yellow", "against": "bold red"}


def show(result: ComparisonResult) -> None:
    """Print the result to standard output: rich on a terminal, clean aligned text otherwise."""
    verdicts = verdict.judge(result)
    if sys.stdout.isatty():
        _show_rich(result, verdicts)
    else:
        print(plain(result, verdicts))


def columns(result: ComparisonResult) -> list[str]:
    """Headings of ``rows``."""
    return ["arm", result.metric, f"vs {result.control.label} [95 %]", "time", "memory", "verdict"]


def rows(result: ComparisonResult, verdicts: list[Verdict]) -> list[list[str]]:
    """One row per arm, the control last."""
    words = {v.arm: v for v in verdicts}
    sums = {a.name: stats.summary(result, a.name) for a in result.arms}
    places = max(3, min(5, max(text.decimals(s.sd, s.mean or 0.0) for s in sums.values())))
    order = [*result.challengers, result.control]
    return [_row(result, a.name, metric_text(sums[a.name], places), words.get(a.name)) for a in order]


def _row(result: ComparisonResult, arm: str, metric: str, found: Verdict | None) -> list[str]:
    label = next(a.label for a in result.arms if a.name == arm)
    if found is None:
        return [label, metric, "", "", "", "control"]
    cost = stats.costs(result, arm)
    return [label, metric, found.effect_text, text.ratio(cost.time), text.ratio(cost.memory), found.word]


def metric_text(s: stats.Summary, places: int) -> str:
    """``2.345 ± 0.012``, with the number of failures."""
    mean = text.fixed(s.mean, places) + (f" ± {text.fixed(s.sd, places)}" if s.sd is not None else "")
    if not s.failed:
        return mean
    failed = f"{s.failed}/{s.planned} failed"
    return failed if s.mean is None else f"{mean} ({failed})"


def remarks(result: ComparisonResult, verdicts: list[Verdict]) -> list[str]:
    """The result's own notes and what a reader of the table must know."""
    found = list(result.notes)
    worst = stats.penalty(result)
    if worst is not None and any(v.failed or v.failed_control for v in verdicts):
        found.append(
            f"A failed run counts as {result.metric} {text.significant(worst, 4)} in the differences "
            "(the worst value of any run plus the range of all); mean ± sd is over the runs that finished."
        )
    if len(verdicts) > 1:
        adjusted = ", ".join(f"{v.arm} {text.significant(v.p_holm, 2)}" for v in verdicts)
        found.append(f"Each verdict uses its own interval; p adjusted for {len(verdicts)} comparisons (Holm): {adjusted}.")
    return found


def searches(result: ComparisonResult) -> str:
    """How the arms were tuned: the grid, and how far a search might go on."""
    if not result.tuning:
        return "Nothing was tuned."
    first = result.tuning[0]
    grid = text.counted(len(first.values) - len(first.further), "value")
    if not result.widen:
        return f"Every search tried {grid}."
    more = text.counted(result.widen, "value")
    return f"Every search starts with {grid} and goes on by the grid's factor, by at most {more}, while its best is at an edge."


def plain(result: ComparisonResult, verdicts: list[Verdict]) -> str:
    """The whole output as text without colours; numbers stand right-aligned."""
    body = [columns(result), *rows(result, verdicts)]
    widths = [max(len(r[i]) for r in body) for i in range(len(body[0]))]
    lines = [f"{result.name}: {result.question}" if result.question else result.name, ""]
    for r in body:
        cells = [c.ljust(w) if i in (0, len(r) - 1) else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines += ["", *(f"{v.word}: {v.text}" for v in verdicts)]
    lines += [f"note: {n}" for n in remarks(result, verdicts)]
    return "\n".join(lines)


def _show_rich(result: ComparisonResult, verdicts: list[Verdict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(result.question or result.name), title_justify="left")
    for i, name in enumerate(columns(result)):
        settings: dict[str, Any] = {"justify": "left" if i in (0, 5) else "right", "no_wrap": i != 1}
        table.add_column(Text(name), **settings)
    for r in rows(result, verdicts):
        table.add_row(*(Text(c) for c in r[:-1]), Text(r[-1], style=STYLES.get(r[-1], "dim")))
    console.print(table)
    for v in verdicts:
        console.print(Text.assemble((v.word, STYLES[v.word]), ": ", v.text))
    for note in remarks(result, verdicts):
        console.print(Text(f"note: {note}", style="dim"))
