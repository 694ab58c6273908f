"""Pages are complete, self-contained, well-formed, escaped, small; their numbers are the result's."""

import math
import re
from html.parser import HTMLParser

import fakes
import numpy as np
import pytest

from metier.compare import curves, page, plots, report, runpage
from metier.compare.results import Curve

VOID = {"meta", "link", "br", "hr", "img", "input"}
SELF_CLOSED = {"path", "line", "rect", "circle"}


class Page(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            assert tag not in SELF_CLOSED or tag == "path" or tag == "circle", f"<{tag}> is not closed"
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict]:
        return [a for t, a in self.tags if t == tag]


def events(steps=60, evals=True):
    found = []
    for i in range(1, steps + 1):
        found.append({
            "event": "step", "step": i, "time": 0.1 * i, "loss": 2 + 6 / i, "lr": 1e-3 * (1 - i / steps),
            "tokens": i * 100, "units": 100, "seconds": 0.1, "tokens_per_second": 1000.0 + i, "memory": 3e8,
        })  # fmt: skip
        if evals and i % 10 == 0:
            found.append({"event": "eval", "step": i, "tokens": i * 100, "eval_loss": 2 + 6 / i, "time": 1.0})
    return found


RUN = {
    "format": 1, "status": "done", "command": ["metier", "train", "my run.yaml"],
    "run": {"model": "lab/llama-1m", "name": None, "train": {"batch": 16, "seed": 0}},
    "steps": 60, "step": 60,
    "seconds": 75.0, "metrics": {"eval_loss": 2.1234}, "environment": fakes.ENVIRONMENT,
    "model": {"name": "lab/llama-1m", "source": "lab", "fingerprint": "f00"}, "data": {}, "world": 1,
}  # fmt: skip
PAGES = {
    "comparison": lambda: report.render(fakes.demo()),
    "one seed": lambda: report.render(fakes.comparison({"a": [1.0], "b": [2.0]}, control="b")),
    "all failed": lambda: report.render(fakes.comparison({"a": [None, None], "b": [None, None]}, control="b")),
    "run": lambda: report.render_run(RUN, events()),
    "empty run": lambda: report.render_run({}, []),
}


@pytest.fixture(scope="module", params=PAGES)
def html(request):
    return PAGES[request.param]()


def test_every_page_is_well_formed_and_self_contained(html):
    parsed = Page(html)
    assert len(html.encode()) < 2_000_000
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert not parsed.all("script")
    assert not parsed.all("iframe")
    for _, attrs in parsed.tags:
        assert not attrs.get("src")
        assert attrs.get("href", "data:,").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in attrs)
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {"#frame"}
    assert "default-src 'none'" in html


def test_every_page_serves_phones_dark_mode_print_and_readers(html):
    parsed = Page(html)
    assert any(m.get("name") == "viewport" and "width=device-width" in m["content"] for m in parsed.all("meta"))
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert parsed.all("html") == [{"lang": "en"}]
    assert len(parsed.all("h1")) == 1
    charts = [a for a in parsed.all("svg") if "viewbox" in a and a.get("aria-hidden") != "true"]
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert not re.search(r'(stroke|fill)="#', html), "colours come from the style sheet, so that dark mode works"
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", " ".join(a.get("d") or "" for a in parsed.all("path")))


def test_all_colours_exist_in_both_themes():
    style = (page.TEMPLATES / "style.css.j2").read_text(encoding="utf-8")
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)[:2])
    assert {f"--s{i}" for i in range(8)} <= dark
    assert light - dark == {"--radius"}
    used = set(re.findall(r"var\((--[\w-]+)", style)) - {"--c", "--d", "--w"}
    assert used <= light


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two ``#rrggbb`` colours."""

    def luminance(c):
        parts = [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_have_contrast(theme):
    style = (page.TEMPLATES / "style.css.j2").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.S)[theme]
    c = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))
    for surface in ("--bg", "--card"):
        assert contrast(c["--ink"], c[surface]) >= 7
        assert contrast(c["--soft"], c[surface]) >= 4.5
    for word in ("holds", "direction", "unclear", "against"):
        assert contrast(c[f"--{word}"], c[f"--{word}-bg"]) >= 4.5
    for i in range(8):
        assert contrast(c[f"--s{i}"], c["--card"]) >= 3


def test_the_verdict_comes_first_with_word_and_interval():
    text = Page(PAGES["comparison"]()).text
    assert text.index("holds") < text.index("Result")
    assert text.index("muon ends with a lower eval_loss than adamw, by 0.108") < text.index("Curves")
    assert "−0.108 [−0.143, −0.073]" in text


def test_a_comparison_page_holds_every_run_and_what_is_needed_to_repeat_it():
    result = fakes.demo()
    text = Page(report.render(result)).text
    for r in result.runs:
        if r.metric is not None:
            assert f"{r.metric:.4f}" in text
    for expected in (
        "diverged: the loss is not finite at step 41", "metier compare recipes/demo.yaml", "transformers",
        "×1.30", "286 MiB", "3.43 MiB (×0.50)", "adamw: the best optimizer.lr (0.0075) is at the edge",
        "lr: 0.003",
        result.code_hash[:16], "best (edge)", "A failed run counts as eval_loss 3.599",
        "164 k tokens", "Holm",
    ):  # fmt: skip
        assert expected in text, expected


def test_charts_come_with_the_same_numbers():
    parsed = Page(PAGES["comparison"]())
    assert parsed.text.count("The same as numbers") == 4
    assert len([a for a in parsed.all("svg") if a.get("role") == "img"]) == 3 + 4 + 1
    end = np.mean([r.metric for r in fakes.demo().finals("muon")])
    assert f"{end:.4f}" in parsed.text


def test_everything_is_escaped():
    evil = '<script>alert("1")</script>&'
    result = fakes.comparison(
        {evil: [1.0, 1.1, None], "b": [2.0, 2.0, 2.0]}, control="b", question=evil, name=evil,
        metric=evil, notes=[evil], commands=[evil], environment={evil: evil},
    )  # fmt: skip
    result.runs[0].error = evil
    html = report.render(result)
    assert not Page(html).all("script")
    assert "<script" not in html
    run = {**RUN, "error": evil, "run": {evil: evil}, "status": evil, "metrics": {evil: 1.0}}
    html = report.render_run(run, [*events(), {"event": "notice", "text": evil}, {"event": "eval", "step": 3, evil: 1.0}])
    assert "<script" not in html
    Page(html)


def test_long_runs_stay_small():
    result = fakes.comparison({"a": [1.0] * 5, "b": [2.0] * 5}, control="b")
    rng = np.random.default_rng(0)
    for r in result.runs:
        r.curve = fakes.loss_curve(2.0, 20_000, rng=rng, noise=0.1, speed=0.1)
        r.eval_curve = fakes.loss_curve(2.0, 2_000, rng=rng, noise=0.0, speed=0.0)
    assert len(report.render(result).encode()) < 300_000
    assert len(report.render_run(RUN, events(20_000)).encode()) < 300_000


def test_higher_is_better_turns_the_picture_round():
    result = fakes.comparison({"a": [0.5, 0.6], "b": [0.4, 0.4]}, control="b", lower_is_better=False, metric="accuracy")
    html = report.render(result)
    assert "← worse" in html
    assert "accuracy (higher is better)" in Page(html).text


@pytest.mark.parametrize("lower", [True, False])
def test_the_shaded_zone_lies_beyond_the_minimum_on_the_better_side(lower):
    axis = plots.Axis(-1.0, 1.0)
    svg = plots.forest(
        -0.3, -0.5, -0.1, axis=axis, minimum=0.1, lower_is_better=lower, word="holds", label="d", name="n"
    )  # fmt: skip
    x, width = map(float, re.search(r'class="zone" x="([\d.]+)" y="\d+" width="([\d.]+)"', svg).groups())
    inner = plots.WIDTH - 32
    place = [16 + inner * (v + 1) / 2 for v in ((-1.0, -0.1) if lower else (0.1, 1.0))]
    assert (x, x + width) == (pytest.approx(place[0], abs=0.1), pytest.approx(place[1], abs=0.2))
    left, right = map(float, re.search(r'class="interval holds" d="M([\d.]+) \d+H([\d.]+)M', svg).groups())
    assert (left, right) == (
        pytest.approx(16 + inner * 0.25, abs=0.1),
        pytest.approx(16 + inner * 0.45, abs=0.1),
    )


def test_final_runs_and_trials_have_tables_of_their_own():
    result = fakes.demo()
    finals, trials = report._runs(result, finals=True), report._runs(result, finals=False)
    assert (len(finals.rows), len(trials.rows)) == (12, 12)
    assert finals.rows[0][:2] == ["muon", 0]
    assert trials.rows[0][:4] == ["muon", 1, "lr=0.0012", "2.5200"]
    assert (finals.columns[1], trials.columns[1]) == ("seed", "trial")


# --- run pages ----------------------------------------------------------------------------------------------


def test_a_run_page_has_metrics_curves_notices_and_configuration():
    found = [
        *events(),
        {"event": "notice", "text": "hello"},
        {"event": "guard", "step": 7, "text": "not finite: loss"},
    ]
    parsed = Page(report.render_run({**RUN, "error": "out of memory"}, found))
    for expected in ("2.1234", "hello", "step 7: not finite: loss", "batch: 16", "'my run.yaml'",
                     "training loss",
                     "learning rate", "out of memory", "75.0 s", "60 of 60"):  # fmt: skip
        assert expected in parsed.text, expected
    assert "name: null" not in parsed.text
    assert "peak memory (MiB)" not in parsed.text, "a constant is not drawn"


def test_the_tiles_are_metrics_not_bookkeeping():
    metrics = {"loss": 2.5, "lr": 1e-5, "units": 100.0, "memory": 3e8, "margin": 0.5, "eval_loss": 2.1}
    tiles = runpage._tiles({"metrics": metrics}, [])
    assert tiles == [("eval_loss", "2.1"), ("training loss", "2.5"), ("margin", "0.5")]


def test_configuration_is_shown_without_what_is_unset():
    shown = page.outline({"a": None, "b": {}, "c": [], "d": {"e": 1e-3, "f": [1, 2]}, "g": "x", "h": False})
    assert shown == "d:\n  e: 0.001\n  f: [1, 2]\ng: x\nh: false"


def test_a_run_page_bears_what_a_crash_leaves():
    broken = [
        {"event": "step", "step": 1, "loss": math.nan, "tokens": None},
        {"event": "eval", "step": 1},
        {"event": "x"},
    ]
    Page(report.render_run({"status": "failed", "run": None, "command": None, "metrics": None}, broken))


# --- curves -------------------------------------------------------------------------------------------------


def test_curves_are_the_mean_of_the_seeds_with_their_range():
    result = fakes.comparison({"a": [1.0, 2.0], "b": [3.0, 3.0]}, control="b")
    for r, level in zip(result.finals("a"), (1.0, 2.0), strict=True):
        r.curve = Curve(
            step=[1, 2, 3],
            tokens=[10, 20, 30],
            seconds=[level, 2 * level, 3 * level],
            value=[9.0, 5.0, level],
        )
    control, a = curves.by_arm(result, "tokens", evals=False)
    assert (control.style, a.style) == ("s0", "s1")
    assert (a.x, a.y, a.low, a.high) == ([10, 20, 30], [9, 5, 1.5], [9, 5, 1], [9, 5, 2])
    by_time = curves.by_arm(result, "seconds", evals=False)[1]
    assert (by_time.x[0], by_time.x[-1]) == (2.0, 3.0), "from where both seeds have begun to where the faster one ends"
    assert by_time.y[-1] == pytest.approx((1.0 + (9.0 + 5.0) / 2) / 2)


def test_failed_runs_are_drawn_only_where_no_other_is_left():
    result = fakes.comparison({"a": [1.0, None], "b": [None, None]}, control="b")
    b, a = curves.by_arm(result, "tokens", evals=False)
    assert a.y[-1] == pytest.approx(1.0)
    assert len(a.low) == 0
    assert len(b.x) > 0


def test_of_many_arms_the_best_are_drawn_each_in_its_own_style():
    metrics = {f"a{i}": [3.0 - i / 10] for i in range(10)} | {"bad": [None], "old": [9.0]}
    result = fakes.comparison(metrics, control="old")
    names = [a.name for a in curves.drawn(result)]
    assert names == ["old", *(f"a{i}" for i in range(3, 10))]
    assert sorted(curves.styles(result).values()) == [f"s{i}" for i in range(8)]
    assert "the best 7 and the control are drawn" in Page(report.render(result)).text
    turned = result.model_copy(update={"lower_is_better": False})
    assert [a.name for a in curves.drawn(turned)] == ["old", *(f"a{i}" for i in range(7))]


def test_evaluations_without_times_take_those_of_their_steps():
    evals = Curve(step=[2, 4], tokens=[2, 4], seconds=[0, 0], value=[1, 1])
    curve = Curve(step=[1, 3, 5], tokens=[1, 3, 5], seconds=[10, 30, 50], value=[1, 1, 1])
    assert curves.timed(evals, curve).seconds == [20, 40]


def test_smoothing_keeps_ends_lines_and_means():
    line = np.linspace(5, 1, 200)
    assert curves.smoothed(line) == pytest.approx(line)
    noise = np.random.default_rng(0).standard_normal(400)
    smooth = curves.smoothed(noise)
    assert smooth[200] == pytest.approx(noise[190:211].mean())
    assert (smooth[0], smooth[-1]) == (noise[0], pytest.approx(noise[-1]))
    assert list(curves.smoothed([3.0, 1.0])) == [3.0, 1.0]


# --- axes ---------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside():
    assert plots.nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert plots.nice_ticks(2.13, 2.79, 5) == [2.2, 2.4, 2.6]
    assert plots.Axis(1e-4, 1e-1, log=True).ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert len(plots.Axis(2.9e-3, 3.1e-3, log=True).ticks()) >= 1


def test_tick_labels_differ():
    assert plots.tick_labels([0, 0.5, 1.0]) == ["0", "0.5", "1.0"]
    assert plots.tick_labels([39_000, 39_500, 40_000]) == ["39.0 k", "39.5 k", "40.0 k"]
    assert plots.tick_labels([286.10, 286.12]) == ["286.10", "286.12"]
    assert plots.tick_labels([]) == []
    assert plots.tick_labels([0.0, 0.0001]) == ["0", "0.0001"]
    assert plots.tick_labels([2e-5, 4e-5]) == ["2e−05", "4e−05"]


def test_axes_of_nothing_and_of_one_value_have_a_width():
    for axis in (
        plots.around([]),
        plots.around([2.0, 2.0]),
        plots.around([0.0]),
        plots.around([3e-3], log=True),
    ):
        assert axis.high > axis.low
        assert 0 < axis.at(axis.low + (axis.high - axis.low) / 2) < 1


def test_trials_far_off_and_failed_are_marked_at_the_edge():
    series = [plots.Series("a", "s1", [1e-3, 3e-3, 1e-2, 3e-2], [2.5, 2.4, 90.0, math.nan], marks=[1])]
    svg = plots.trials(series, xlabel="lr", ylabel="loss", name="n")
    assert svg.count('class="ring s1"') == 1
    assert svg.count('class="cross s1"') == 1
    assert "90 (off the chart)" in svg
