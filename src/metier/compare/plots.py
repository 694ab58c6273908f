"""Small charts as inline SVG: no dependency, no script, colours from CSS variables so that dark mode works.

Every function returns markup with all text escaped. Positions are in a frame 480 units wide that scales with
the page; a phone shows it at about three quarters of that, so text is set large.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

from metier.compare import text

WIDTH, HEIGHT = 480, 310
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 30, 46
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line with its band; ``style`` is a CSS class ``s0`` … ``s7`` that sets the colour and dash."""

    label: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False
    marks: Sequence[int] = field(default_factory=tuple)
    """Indices to ring, e.g. the best trial."""


@dataclass(frozen=True)
class Axis:
    """A range with its ticks and the way values map to the frame."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Position in [0, 1]."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the range."""
        return _log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, count)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels with as many decimals as tell neighbours apart; thousands from 10 000 on as ``k``."""
    largest = max((abs(t) for t in ticks), default=0.0)
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=0.0)
    if largest >= 1e4:
        thousand = 1e3 if largest < 1e6 or step < 1e5 else 1e6
        places = _places(step / thousand)
        return [f"{text.fixed(t / thousand, places)} {'k' if thousand == 1e3 else 'M'}" if t else "0" for t in ticks]
    if not step or step < 1e-4 * (1 - 1e-9):
        return [text.significant(t, 4) for t in ticks]
    return [text.fixed(t, _places(step)) if t else "0" for t in ticks]


def _places(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten within ``[low, high]``."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 6)] if found else [low, high]


def around(values: Sequence[float], *, log: bool = False, pad: float = 0.06) -> Axis:
    """An axis that holds all finite values with some room."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(finite), max(finite)
    if log:
        room = max((high / low) ** pad, 1.15 if high == low else 1.02)
        return Axis(low / room, high * room, log=True)
    room = pad * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room)


def late_range(series: Sequence[Series], skip: float = 0.08) -> Axis:
    """A y-axis fitted to what follows the first part of training, whose heights would flatten the rest."""
    kept: list[float] = []
    for s in series:
        start = min(s.x, default=0) + skip * (max(s.x, default=0) - min(s.x, default=0))
        late = [i for i, x in enumerate(s.x) if x >= start]
        kept += [v for ys in (s.y, s.low, s.high) if len(ys) for v in (ys[i] for i in late) if math.isfinite(v)]
    if len(kept) < 2:
        return around(kept)
    q1, q3 = np.quantile(kept, [0.25, 0.75])
    reach = 3 * (q3 - q1)
    inside = [v for v in kept if q1 - reach <= v <= q3 + reach]
    return around(inside)


# --- charts -------------------------------------------------------------------------------------------------


def lines(
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str,
    name: str,
    clip: bool = True,
    xformat: Format = text.scaled,
) -> Markup:
    """Lines with bands over a linear x; ``clip`` fits the y-axis to what follows the first steps."""
    x = around([v for s in series for v in s.x], pad=0.0)
    y = late_range(series) if clip else around([v for s in series for ys in (s.y, s.low, s.high) for v in ys])
    body = [_frame(x, y, xlabel, ylabel, xformat), Markup('<g clip-path="url(#frame)">')]
    for s in series:
        body += [_band(s, x, y), _line(s, x, y)]
    return _svg([*body, Markup("</g>")], name)


def trials(series: Sequence[Series], *, xlabel: str, ylabel: str, name: str, lower_is_better: bool = True) -> Markup:
    """Metric against a tuned option on a log axis; rings mark the best, crosses the failed trials."""
    finite = [v for s in series for v in s.y if math.isfinite(v)]
    x = around([v for s in series for v in s.x], log=all(v > 0 for s in series for v in s.x))
    y = around(_without_far(finite, lower_is_better), pad=0.12)
    body = [_frame(x, y, xlabel, ylabel, text.significant)]
    for s in series:
        body += [_line(s, x, y, limit=True), *(_trial(s, i, x, y, lower_is_better) for i in range(len(s.x)))]
    return _svg(body, name)


def _without_far(values: Sequence[float], lower_is_better: bool) -> list[float]:
    """The values without those so much worse than the middle that the rest would lie flat."""
    if len(values) < 3:
        return list(values)
    best = min(values) if lower_is_better else max(values)
    reach = 4 * abs(float(np.median(values)) - best)
    return [v for v in values if not reach or abs(v - best) <= reach]


def _trial(s: Series, i: int, x: Axis, y: Axis, lower_is_better: bool) -> Markup:
    px, value = _px(x, s.x[i]), s.y[i]
    title = f"{s.label}: {text.significant(s.x[i])} → "
    worst = TOP + 8 if lower_is_better else HEIGHT - BOTTOM - 8
    if not math.isfinite(value):
        cross = f"M{px - 5:.1f} {worst - 5}l10 10m0 -10l-10 10"
        return Markup('<path class="cross {}" d="{}"><title>{}failed</title></path>').format(s.style, cross, title)
    if not 0 <= y.at(value) <= 1:
        way = -1 if y.at(value) > 1 else 1
        edge = TOP + 4 if way < 0 else HEIGHT - BOTTOM - 4
        arrow = f"M{px:.1f} {edge}l6 {-9 * way}h-12z"
        return Markup('<path class="dot {}" d="{}"><title>{}{} (off the chart)</title></path>').format(
            s.style, arrow, title, text.significant(value, 4)
        )
    py = _py(y, value)
    ring = Markup('<circle class="ring {}" cx="{:.1f}" cy="{:.1f}" r="9"/>').format(s.style, px, py)
    dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="4.5"><title>{}{}</title></circle>').format(
        s.style, px, py, title, text.significant(value, 4)
    )
    return (ring if i in s.marks else Markup()) + dot


def forest(
    effect: float | None,
    low: float | None,
    high: float | None,
    *,
    axis: Axis,
    minimum: float,
    lower_is_better: bool,
    word: str,
    label: str,
    name: str,
) -> Markup:
    """A difference with its interval on a line with 0 and the minimum effect."""
    height, mid, foot = 112, 42, 70
    width = WIDTH - 32

    def px(v: float) -> float:
        return 16 + width * min(1.0, max(0.0, axis.at(v)))

    better = (16.0, px(-minimum)) if lower_is_better else (px(minimum), WIDTH - 16.0)
    out = [
        Markup('<rect class="zone" x="{:.1f}" y="18" width="{:.1f}" height="{}"/>').format(
            better[0], max(0.0, better[1] - better[0]), foot - 18
        ),
        Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="14" y2="{1}"/>').format(px(0.0), foot),
        Markup('<line class="axis" x1="16" x2="{}" y1="{}" y2="{}"/>').format(WIDTH - 16, foot, foot),
    ]
    out += [_forest_tick(px(t), t, foot) for t in axis.ticks(6)]
    if low is not None and high is not None:
        d = f"M{px(low):.1f} {mid}H{px(high):.1f}M{px(low):.1f} {mid - 8}v16M{px(high):.1f} {mid - 8}v16"
        out.append(Markup('<path class="interval {}" d="{}"/>').format(word, d))
    if effect is not None:
        out.append(Markup('<circle class="point {}" cx="{:.1f}" cy="{}" r="7"/>').format(word, px(effect), mid))
    sides = ("← better", "worse →") if lower_is_better else ("← worse", "better →")
    out += [
        Markup('<text class="side" x="16" y="11">{}</text>').format(sides[0]),
        Markup('<text class="side" x="{}" y="11" text-anchor="end">{}</text>').format(WIDTH - 16, sides[1]),
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(WIDTH / 2, height - 8, label),
    ]
    return _svg(out, name, height=height)


def _forest_tick(px: float, value: float, foot: int) -> Markup:
    anchor = "start" if px < 30 else "end" if px > WIDTH - 30 else "middle"
    return Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
        px, foot + 16, anchor, text.significant(value)
    )


def forest_axis(bounds: Sequence[float], minimum: float, lower_is_better: bool) -> Axis:
    """An axis with 0, the minimum effect and all bounds."""
    asked = -minimum if lower_is_better else minimum
    finite = [v for v in [*bounds, 0.0, asked * 1.6] if math.isfinite(v)]
    return around(finite, pad=0.08)


# --- pieces -------------------------------------------------------------------------------------------------


def _svg(body: Sequence[Markup], name: str, height: int = HEIGHT) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, name)
    return head + Markup("").join(body) + Markup("</svg>")


def _px(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis.at(value)


def _py(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.at(value)


def _frame(x: Axis, y: Axis, xlabel: str, ylabel: str, xformat: Format) -> Markup:
    out = []
    for t, shown in zip(ticks := y.ticks(5), tick_labels(ticks), strict=True):
        py = _py(y, t)
        out.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, py, py))  # fmt: skip
        out.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT - 8, py + 4.5, shown))  # fmt: skip
    base = HEIGHT - BOTTOM
    out.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, base, base))
    for t in x.ticks(5):
        px = _px(x, t)
        anchor = "end" if px > WIDTH - RIGHT - 14 else "middle"
        out.append(Markup('<line class="axis" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(px, base, base + 4))
        out.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
            px, base + 19, anchor, xformat(t)))  # fmt: skip
    out.append(Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, xlabel))  # fmt: skip
    out.append(Markup('<text class="label" x="4" y="14">{}</text>').format(ylabel))
    return Markup("").join(out)


def _line(s: Series, x: Axis, y: Axis, limit: bool = False) -> Markup:
    points = [(_px(x, a), _py(y, b)) for a, b in zip(s.x, s.y, strict=True) if _shown(b, y, limit)]
    if not points:
        return Markup()
    d = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    title = f"{s.label}: {text.significant(_last(s.y), 4)} at the end"
    path = Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(s.style, d, title)
    dots = points if s.dots or len(points) == 1 else []
    return path + Markup("").join(
        Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(s.style, px, py) for px, py in dots
    )


def _shown(value: float, y: Axis, limit: bool) -> bool:
    return math.isfinite(value) and (not limit or 0 <= y.at(value) <= 1)


def _last(values: Sequence[float]) -> float:
    return next((v for v in reversed(values) if math.isfinite(v)), math.nan)


def _band(s: Series, x: Axis, y: Axis) -> Markup:
    kept = [i for i in range(len(s.low)) if math.isfinite(s.low[i]) and math.isfinite(s.high[i])]
    if len(kept) < 2:
        return Markup()
    upper = [f"{_px(x, s.x[i]):.1f} {_py(y, s.high[i]):.1f}" for i in kept]
    lower = [f"{_px(x, s.x[i]):.1f} {_py(y, s.low[i]):.1f}" for i in reversed(kept)]
    return Markup('<path class="band {}" d="M{}Z"/>').format(s.style, "L".join([*upper, *lower]))


def clip_definition() -> Markup:
    """The clip path that ``lines`` refers to; a page holds it once."""
    return Markup(
        '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs><clipPath id="frame">'
        '<rect x="{}" y="{}" width="{}" height="{}"/></clipPath></defs></svg>'
    ).format(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)


def swatch(style: str) -> Markup:
    """A short sample of a line for the legend."""
    return Markup('<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true"><path class="line {}" d="M1 6H33"/></svg>').format(
        escape(style)
    )
