"""One self-contained HTML page about a comparison or a run: verdict first, then everything it rests on.

The pages work offline and without scripts; ``render`` and ``render_run`` return them as text.
"""

from typing import Any

from metier.compare import curves, page, plots, stats, table, text, verdict
from metier.compare.page import Chart, Table
from metier.compare.plots import Series
from metier.compare.results import ComparisonResult, RunResult
from metier.compare.verdict import Verdict

GLYPHS = {"holds": "✓", "direction": "↗", "unclear": "?", "against": "✗"}
UNITS = {"tokens": "", "flops": "FLOP", "seconds": "s"}


def render(result: ComparisonResult) -> str:
    """The page of a comparison."""
    verdicts = verdict.judge(result)
    return page.write(
        "comparison.html.j2", result.question or result.name, result=result,
        heading=result.question or result.name, meta=_meta(result), glyphs=GLYPHS,
        verdicts=_verdict_cards(result, verdicts), legend_text=_words(result), warnings=result.notes,
        summary=_summary(result, verdicts), legend=_legend(result), charts=_curves(result),
        curves_hint=_curves_hint(result), tuning=_tuning(result), tuning_hint=_tuning_hint(result),
        tuned=_tuned(result), costs=_costs(result), finals=_runs(result, finals=True),
        trials=_runs(result, finals=False), limits=_limits(result, verdicts), arms=_arms(result),
        environment=[*page.flat(result.environment), ("code", result.code_hash[:16])],
    )  # fmt: skip


def render_run(run: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """The page of one run, from ``run.json`` and the events of ``metrics.jsonl``."""
    from metier.compare.runpage import render_run as write

    return write(run, events)


# --- head ---------------------------------------------------------------------------------------------------


def _meta(result: ComparisonResult) -> list[tuple[str, str]]:
    better = "lower" if result.lower_is_better else "higher"
    found = [
        ("metric", f"{result.metric} ({better} is better)"),
        ("control", result.control.label),
        ("budget per run", _budget(result)),
        ("runs", f"{text.counted(len(result.arms), 'arm')} × {text.counted(len(result.seeds), 'seed')}"),
    ]
    if result.tuning:
        first = result.tuning[0]
        more = f", up to {result.widen} more while the best is at an edge" if result.widen else ""
        found.append(("tuning", f"{text.counted(len(first.values) - len(first.further), 'trial')} per arm{more}"))
    return [*found, ("made", result.created.replace("T", " ").replace("Z", " UTC"))]


def _budget(result: ComparisonResult) -> str:
    budget = result.budget
    if budget.kind == "seconds":
        return text.duration(budget.amount)
    return text.scaled(budget.amount, UNITS[budget.kind]) + (" tokens" if budget.kind == "tokens" else "")


def _verdict_cards(result: ComparisonResult, verdicts: list[Verdict]) -> list[dict[str, Any]]:
    labels = {a.name: a.label for a in result.arms}
    whole = [v for v in verdicts if not v.failed and not v.failed_control]
    shared = _axis(result, whole)
    return [
        {
            "word": v.word, "label": f"{labels[v.arm]} against {labels[v.control]}", "text": v.text,
            "detail": _detail(v),
            "forest": plots.forest(
                v.effect, v.low, v.high, axis=shared if v in whole else _axis(result, [v]),
                minimum=result.minimum_effect, lower_is_better=result.lower_is_better, word=v.word,
                label=f"difference in {result.metric}, {labels[v.arm]} − {labels[v.control]}",
                name=f"{labels[v.arm]} − {labels[v.control]}: {v.effect_text}",
            ),
        }
        for v in verdicts
    ]  # fmt: skip


def _axis(result: ComparisonResult, verdicts: list[Verdict]) -> plots.Axis:
    bounds = [b for v in verdicts for b in (v.effect, v.low, v.high) if b is not None]
    return plots.forest_axis(bounds, result.minimum_effect, result.lower_is_better)


def _detail(v: Verdict) -> str:
    found = [f"Difference {v.effect_text}"]
    if v.p is not None:
        found.append(f"p = {text.significant(v.p, 2)} (paired t)")
    if v.p_holm is not None and v.p_holm != v.p:
        found.append(f"{text.significant(v.p_holm, 2)} after Holm")
    if v.p_signflip is not None and v.n > 1:
        least = f"least possible {2 / 2**v.n:.2g}"
        found.append(f"sign flips: p = {text.significant(v.p_signflip, 2)} ({least})")
    return " · ".join(found)


def _words(result: ComparisonResult) -> str:
    asked = f" by more than {result.minimum_effect:g}" if result.minimum_effect else ""
    direction = " “Direction”: all of it is better, but perhaps by less." if result.minimum_effect else ""
    shaded = "The shaded zone is what the claim asks for. " if result.minimum_effect else ""
    return (
        f"{shaded}“Holds”: the whole 95 % interval is better{asked}.{direction} “Against”: "
        "all of it is worse. “Unclear”: it contains no difference."
    )


# --- tables -------------------------------------------------------------------------------------------------


def _summary(result: ComparisonResult, verdicts: list[Verdict]) -> Table:
    columns = table.columns(result)
    columns[1] = f"{result.metric}, mean ± sd"
    return Table(columns, table.rows(result, verdicts), text=(0, 5))


def _costs(result: ComparisonResult) -> Table:
    rows = []
    for arm in [*result.challengers, result.control]:
        done = [r for r in result.finals(arm.name) if not r.failed]
        ratios = stats.costs(result, arm.name)
        show = not arm.is_control

        def cell(shown: str, ratio: float | None, show: bool = show) -> str:
            return f"{shown} ({text.ratio(ratio)})" if show and ratio is not None else shown

        def mean(name: str, done: list[RunResult] = done) -> float | None:
            return sum(getattr(r, name) for r in done) / len(done) if done else None

        rows.append([
            arm.label, cell(text.duration(mean("seconds")), ratios.time),
            cell(text.size(mean("peak_bytes")), ratios.memory),
            cell(text.size(mean("state_bytes")), ratios.state),
            cell(text.scaled(mean("tokens")), ratios.tokens),
            cell(text.scaled(mean("flops"), "FLOP"), ratios.flops),
            text.scaled(mean("params")),
        ])  # fmt: skip
    caption = f"Mean per finished run; × is relative to {result.control.label} on the seeds that both finished."
    columns = [
        "arm",
        "training time",
        "peak memory",
        "optimizer state",
        "tokens",
        "compute",
        "parameters",
    ]
    return Table(columns, rows, caption)


def _runs(result: ComparisonResult, *, finals: bool) -> Table:
    labels = {a.name: a.label for a in result.arms}
    chosen = [r for r in result.runs if (r.trial is None) == finals]
    rows = [
        [
            labels.get(r.arm, r.arm), r.seed if finals else (r.trial or 0) + 1, _options(r),
            text.fixed(r.metric, 4) if r.metric is not None else "–", text.duration(r.seconds),
            text.size(r.peak_bytes) if r.peak_bytes else "–",
            f"{r.status}: {r.error}" if r.error else r.status,
        ]
        for r in chosen
    ]  # fmt: skip
    columns = ["arm", "seed" if finals else "trial", "tuned", result.metric, "time", "peak memory", "status"]
    return Table(columns, rows, text=(0, 2, 6), wrap=(6,) if any(r.error for r in chosen) else ())


def _options(run: RunResult) -> str:
    shown = [f"{k.split('.')[-1]}={v:g}" if isinstance(v, int | float) else f"{k}={v}" for k, v in run.options.items()]
    return ", ".join(shown)


def _arms(result: ComparisonResult) -> list[dict[str, Any]]:
    return [{"label": a.label, "control": a.is_control, "overrides": page.outline(a.overrides)} for a in result.arms]


# --- curves and tuning --------------------------------------------------------------------------------------


def _legend(result: ComparisonResult) -> list[dict[str, Any]]:
    style = curves.styles(result)
    return [{"label": a.label, "swatch": plots.swatch(style[a.name]), "control": a.is_control} for a in curves.drawn(result)]


def _curves_hint(result: ComparisonResult) -> str:
    several = "Lines are means over the seeds that finished, bands reach from the lowest to the highest of them."
    band = several if len(result.seeds) > 1 else "One seed per line."
    if len(result.challengers) > curves.MOST:
        band = f"Of the arms, the best {curves.MOST} and the control are drawn. {band}"
    return f"{band} The vertical axis is fitted to what follows the first steps; these may lie outside."


def _curves(result: ComparisonResult) -> list[Chart]:
    views = [("tokens", False), ("seconds", False)]
    if curves.has_evals(result):
        views = [("tokens", True), ("seconds", True), ("tokens", False), ("seconds", False)]
    found = [_curve(result, x, evals) for x, evals in views]
    return [c for c in found if c is not None]


def _curve(result: ComparisonResult, x: str, evals: bool) -> Chart | None:
    series = curves.by_arm(result, x, evals=evals)
    if not series:
        return None
    ylabel = result.metric if evals else "training loss"
    xlabel = curves.X[x]
    long = max(len(s.x) for s in series) > 12
    title = f"{ylabel} by {'tokens' if x == 'tokens' else 'time'}"
    svg = plots.lines(series, xlabel=xlabel, ylabel=ylabel, name=f"{title}: {_ends(series)}", clip=long)
    smooth = "" if evals else "Smoothed with a running mean over a twentieth of the run. "
    budget = "Equal height at equal tokens is equal quality for the same data." if x == "tokens" else (
        "Wall-clock time of the training steps on the machine below, evaluations left out."
    )  # fmt: skip
    rows = [[text.scaled(r[0]), *(text.fixed(v, 4) for v in r[1:])] for r in curves.sampled(series)]
    return Chart(title, svg, smooth + budget, Table([xlabel, *(s.label for s in series)], rows))


def _ends(series: list[Series]) -> str:
    return ", ".join(f"{s.label} ends at {text.significant(s.y[-1], 4)}" for s in series)


def _tuning_hint(result: ComparisonResult) -> str:
    labels = {a.name: a.label for a in result.arms}
    edges = ", ".join(labels[t.arm] for t in result.tuning if t.at_edge)
    warning = f" At the edge of what was tried, so perhaps not the best there is: {edges}." if edges else ""
    same = f"{table.searches(result)} All trials are" if result.widen else "Every arm had the same number of trials, all"
    return (
        f"{same} on one seed that no final run uses. Rings mark what the final runs use; crosses are trials that failed.{warning}"
    )


def _tuning(result: ComparisonResult) -> list[Chart]:
    style, labels = curves.styles(result), {a.name: a.label for a in result.arms}
    found = []
    for parameter in dict.fromkeys(t.parameter for t in result.tuning):
        series = []
        for t in (t for t in result.tuning if t.parameter == parameter and t.arm in style):
            order = sorted(range(len(t.values)), key=lambda i: t.values[i])
            series.append(Series(
                labels[t.arm], f"{style[t.arm]}", [t.values[i] for i in order],
                [float("nan") if (m := t.metric[i]) is None else m for i in order],
                marks=[k for k, i in enumerate(order) if t.values[i] == t.best],
            ))  # fmt: skip
        title = f"{result.metric} by {parameter}"
        best = ", ".join(f"{s.label} best at {text.significant(s.x[s.marks[0]])}" for s in series if s.marks)
        svg = plots.trials(
            series, xlabel=f"{parameter} (log scale)", ylabel=result.metric, name=f"{title}: {best}",
            lower_is_better=result.lower_is_better,
        )  # fmt: skip
        found.append(Chart(title, svg, "Colours and dashes as in the legend above."))
    return found


def _tuned(result: ComparisonResult) -> Table:
    labels = {a.name: a.label for a in result.arms}
    rows = []
    for t in result.tuning:
        for value, metric in sorted(zip(t.values, t.metric, strict=True), key=lambda pair: pair[0]):
            mark = ("best (edge)" if t.at_edge else "best") if value == t.best else ""
            shown = "failed" if metric is None else text.fixed(metric, 4)
            origin = [("further" if value in t.further else "grid")] if result.widen else []
            rows.append([labels[t.arm], text.significant(value), shown, *origin, mark])
    name = result.tuning[0].parameter if result.tuning else ""
    tried = ["tried as"] if result.widen else []
    return Table(["arm", name, result.metric, *tried, "used"], rows, text=(0, 3, 4) if tried else (0, 3))


# --- limits -------------------------------------------------------------------------------------------------


def _limits(result: ComparisonResult, verdicts: list[Verdict]) -> list[str]:
    n = len(result.seeds)
    found = [
        f"It is about this model, this data and this budget ({_budget(result)} per run). Rankings can change "
        "with scale, data and length of training.",
        f"The interval is a t-interval over {text.counted(n, 'paired seed')}: arm and control share "
        "the seed, hence the order of the data. It covers the randomness of seeds, not the choice of model "
        "or data.",
        "Final runs use each arm's best trial. The search is as coarse as the trials above.",
        "Time and memory are those of one machine; runs may have shared its cores.",
        *table.remarks(result.model_copy(update={"notes": []}), verdicts),
    ]
    if not result.tuning:
        found[2] = "Nothing was tuned: every arm ran with the settings of the design."
    if n < 5:
        found.append(f"With {text.counted(n, 'seed')} only large differences become clear; more narrow the interval.")
    return found
