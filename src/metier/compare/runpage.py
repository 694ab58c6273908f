"""The page of a single run: how it went, its curves, and what it takes to do it again."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from metier.compare import curves, page, plots, text
from metier.compare.page import Chart, Table
from metier.compare.plots import Series

FIRST = ("loss", "lr", "grad_norm", "tokens_per_second", "memory")
"""Quantities drawn first, in this order; the others follow by name."""
SURROUNDINGS = ("model", "data", "world")
UNDRAWN = {"step", "time", "tokens", "units", "seconds", "event"}
UNTILED = UNDRAWN | {"lr", "grad_norm", "tokens_per_second", "memory"}
"""What a last value says little about, or a tile of its own shows."""
MOST_CHARTS = 14
MOST_ROWS = 60
LABELS = {
    "loss": "training loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "memory": "peak memory (MiB)",
    "tokens_per_second": "tokens per second",
}


def render_run(run: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """The page of one run; both arguments may be incomplete, as after a crash."""
    steps = [e for e in events if e.get("event") == "step"]
    evals = [e for e in events if e.get("event") == "eval"]
    name = _name(run)
    return page.write(
        "run.html.j2", name, heading=name, meta=_meta(run), error=run.get("error"),
        tiles=_tiles(run, steps), notices=_notices(events), charts=_charts(steps, evals), evals=_evals(evals),
        command=shlex.join(str(c) for c in run.get("command") or []),
        config=page.outline(run.get("run") or {}),
        environment=_surroundings(run),
    )  # fmt: skip


def _surroundings(run: dict[str, Any]) -> list[tuple[str, str]]:
    others = {k: run[k] for k in SURROUNDINGS if k in run}
    return [*page.flat(run.get("environment") or {}), *page.flat(others)]


def _name(run: dict[str, Any]) -> str:
    config = run.get("run") or {}
    chosen = [
        str(config.get("name") or ""),
        str((run.get("model") or {}).get("name") or config.get("model") or ""),
    ]
    return " · ".join(c for c in chosen if c) or "Training run"


def _meta(run: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("status", str(run.get("status", "unknown")))]
    if run.get("steps"):
        found.append(("steps", f"{run.get('step', 0)} of {run['steps']}"))
    if run.get("seconds"):
        found.append(("time", text.duration(run["seconds"])))
    return found


def _tiles(run: dict[str, Any], steps: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    given: dict[str, Any] = run.get("metrics") or {}
    metrics = {k: v for k, v in given.items() if _number(v) and k not in UNTILED}
    ordered = sorted(metrics, key=lambda k: (not k.startswith("eval_"), k not in FIRST))
    found = [(LABELS.get(k, k), text.significant(metrics[k], 5)) for k in ordered]
    if steps:
        last = steps[-1]
        found += [("tokens seen", text.scaled(last["tokens"]))] if _number(last.get("tokens")) else []
        found += [("peak memory", text.size(last["memory"]))] if _number(last.get("memory")) else []
        speeds = [e["tokens_per_second"] for e in steps if _number(e.get("tokens_per_second"))]
        found += [("tokens per second", text.scaled(float(np.median(speeds))))] if speeds else []
    return found[:12]


def _notices(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for e in events:
        if e.get("event") in ("notice", "guard"):
            where = f"step {e['step']}: " if "step" in e else ""
            found.append({"text": f"{where}{e.get('text', '')}", "guard": e["event"] == "guard"})
    if len(found) > MOST_ROWS:
        left = len(found) - MOST_ROWS
        found = [*found[:MOST_ROWS], {"text": f"and {left} more in metrics.jsonl", "guard": False}]
    return found


def _charts(steps: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> list[Chart]:
    found = []
    for events, places in ((steps, FIRST), (evals, ())):
        names = {k for e in events for k, v in e.items() if k not in UNDRAWN and _number(v)}
        ordered = [n for n in places if n in names] + sorted(names - set(places))
        found += [c for n in ordered if (c := _chart(events, n)) is not None]
    return found[:MOST_CHARTS]


def _chart(events: Sequence[dict[str, Any]], name: str) -> Chart | None:
    points = [(e["step"], e[name]) for e in events if _number(e.get(name)) and _number(e.get("step"))]
    scale = 2**20 if name == "memory" else 1
    x, y = [float(p[0]) for p in points], [float(p[1]) / scale for p in points]
    if len(points) < 2 or (name != "loss" and max(y) - min(y) <= 1e-3 * abs(max(y))):
        return None
    label = LABELS.get(name, name)
    line = Series(label, "s1 solid", *_thinned(x, y), dots=len(points) <= 12)
    svg = plots.lines(
        [line], xlabel="optimizer step", ylabel=label, clip=name != "lr" and len(points) > 20,
        xformat=lambda v: text.significant(v, 6),
        name=f"{label} by step: from {text.significant(y[0], 4)} to {text.significant(y[-1], 4)}",
    )  # fmt: skip
    rows = [[text.significant(r[0], 6), text.significant(r[1], 5)] for r in curves.sampled([line])]
    return Chart("", svg, "", Table(["step", label], rows))


def _thinned(x: Sequence[float], y: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """At most about ``most`` points: means of equal stretches."""
    width = math.ceil(len(x) / most)
    starts = range(0, len(x), width)
    return [float(np.mean(x[i : i + width])) for i in starts], [float(np.mean(y[i : i + width])) for i in starts]


def _evals(evals: Sequence[dict[str, Any]]) -> Table:
    names = sorted({k for e in evals for k, v in e.items() if _number(v)} - {"step", "time", "tokens"})
    kept = evals[-MOST_ROWS:]
    rows = [[e.get("step", "–"), *(text.significant(e[n], 5) if _number(e.get(n)) else "–" for n in names)] for e in kept]
    caption = f"The last {MOST_ROWS} of {len(evals)}." if len(evals) > MOST_ROWS else ""
    return Table(["step", *names], rows, caption)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
