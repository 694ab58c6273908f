"""The terminal output: aligned without a terminal, complete with one, honest about failures."""

import re
import sys

import fakes
import pytest

from metier.compare import table, text


def plain_of(result, capsys):
    table.show(result)
    return capsys.readouterr().out


def test_plain_output_has_the_numbers_and_no_escape_codes(capsys):
    result = fakes.comparison(
        {"new": [1.91, 1.90, 1.89], "old": [2.0, 2.0, 2.0]}, control="old", minimum_effect=0.05,
        notes=["a remark"],
    )  # fmt: skip
    out = plain_of(result, capsys)
    assert "\x1b" not in out
    assert "1.900 ± 0.010" in out
    assert "−0.100 [−0.125, −0.075]" in out
    assert re.search(r"^new .*×1\.00 +×1\.00 +holds$", out, re.M)
    assert re.search(r"^old .*control$", out, re.M)
    assert "holds: new ends with a lower eval_loss" in out
    assert "note: a remark" in out


def test_columns_stand_under_each_other(capsys):
    lines = plain_of(fakes.demo(), capsys).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("arm "))
    body = lines[head : head + 5]
    assert len({line.index(line.split()[-1]) for line in body}) == 1, "the last column starts at one place"
    time = body[0].index("time") + len("time")
    assert [line[time - 5 : time] for line in body[1:4]] == ["×1.30", "×1.00", "×1.00"]
    assert all(line == line.rstrip() for line in lines)


def test_failures_and_several_arms_are_explained(capsys):
    out = plain_of(fakes.demo(), capsys)
    assert "(1/3 failed)" in out
    assert "A failed run counts as eval_loss 3.599" in out
    assert "Holm" in out
    assert "edge of what was tried" in out


def test_one_arm_needs_no_holm_and_no_failure_no_remark(capsys):
    out = plain_of(fakes.comparison({"a": [1.0, 1.1], "b": [2.0, 2.0]}, control="b"), capsys)
    assert "Holm" not in out
    assert "failed" not in out


def test_one_seed_and_nothing_finished(capsys):
    out = plain_of(fakes.comparison({"a": [1.0], "b": [2.0]}, control="b"), capsys)
    assert "±" not in out
    assert "−1.00" in out
    out = plain_of(fakes.comparison({"a": [None], "b": [None]}, control="b"), capsys)
    assert "1/1 failed" in out
    assert "unclear" in out


@pytest.mark.parametrize("width", ["80", "140"])
def test_a_terminal_gets_every_number_whole(capsys, monkeypatch, width):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", width)
    table.show(fakes.demo())
    out = capsys.readouterr().out
    assert "−0.108 [−0.143, −0.073]" in out
    assert "…" not in out
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in out.splitlines()) <= int(width)


def test_markup_in_names_is_shown_not_obeyed(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    table.show(fakes.comparison({"[bold]x[/bold]": [1.0, 1.1], "b": [2.0, 2.0]}, control="b"))
    assert "[bold]x[/bold]" in capsys.readouterr().out


# --- numbers as text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: text.decimals(0.0248), 3),
        (lambda: text.decimals(1.2), 1),
        (lambda: text.decimals(250.0), 0),
        (lambda: text.decimals(None, 0.0123), 4),
        (lambda: text.decimals(0.0, 0.0), 3),
        (lambda: text.fixed(-0.0001, 3, sign=True), "0.000"),
        (lambda: text.fixed(-1.5, 1), "−1.5"),
        (lambda: text.fixed(1.5, 1, sign=True), "+1.5"),
        (lambda: text.fixed(float("nan"), 1), "–"),
        (lambda: text.scaled(160_000), "160 k"),
        (lambda: text.scaled(999_999), "1 M"),
        (lambda: text.scaled(0), "0"),
        (lambda: text.scaled(8.85e11, "FLOP"), "885 GFLOP"),
        (lambda: text.size(0), "0 B"),
        (lambda: text.size(7_200_000), "6.87 MiB"),
        (lambda: text.size(1020), "1020 B"),
        (lambda: text.size(2**40), "1 TiB"),
        (lambda: text.duration(3.999), "4 s"),
        (lambda: text.duration(61.5), "61.5 s"),
        (lambda: text.duration(245), "4 min 05 s"),
        (lambda: text.duration(3599.6), "1 h 00 min"),
        (lambda: text.counted(1, "seed"), "1 seed"),
        (lambda: text.ratio(None), "–"),
        (lambda: text.significant(1234567.0), "1.23e+06"),
    ],
)
def test_numbers_as_text(call, expected):
    assert call() == expected
