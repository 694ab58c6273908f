"""What people see: quiet, plain lines, a live line, and nothing when nobody can read it."""

import io
import os
import pty
import subprocess
import sys

import pytest

from metier.core import console as module
from metier.core.console import Console, describe, describe_step


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def step(n: int, **more) -> dict:
    return {
        "event": "step",
        "step": n,
        "loss": 2.34567,
        "lr": 1e-3,
        "tokens_per_second": 12_345.0,
        "memory": 2.5e9,
        "time": 0.0,
        **more,
    }


def test_quiet_says_nothing_but_warnings(capsys):
    screen = Console(quiet=True, total=2)
    for event in (
        step(1),
        {"event": "notice", "text": "x"},
        {"event": "eval", "step": 1},
        {"event": "guard", "text": "y"},
    ):
        screen.event(event)
    assert capsys.readouterr() == ("", "")
    screen.event({"event": "notice", "level": "warning", "text": "disk full"})
    assert capsys.readouterr() == ("", "warning: disk full\n")
    screen.close()


def test_plain_lines_are_few(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    screen = Console(total=1000)
    for n in range(1, 1001):
        clock.now += 0.01
        screen.event(step(n))
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, *range(100, 1001, 100)]


def test_slow_steps_show_every_five_seconds(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    screen = Console(total=1000)
    for n in range(1, 61):
        screen.event(step(n))
        clock.now += 1.0
    shown = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert shown == [1, 6, 11, 16, 21, 26, 31, 36, 41, 46, 51, 56]


def test_a_long_run_fills_no_log(capsys, monkeypatch):
    clock = Clock(monkeypatch)
    screen = Console()
    for n in range(1, 100_000):
        screen.event(step(n))
        clock.now += 1.0
    assert 100 < len(capsys.readouterr().err.splitlines()) < 800


def test_everything_else_is_shown(capsys):
    screen = Console()
    screen.event({"event": "notice", "text": "found format text", "time": 1.0})
    screen.event({"event": "eval", "step": 5, "tokens": 10, "eval_loss": 1.23456, "time": 1.0})
    screen.event({"event": "checkpoint", "step": 5, "name": "step-00000005", "time": 1.0})
    screen.event({"event": "guard", "step": 5, "text": "loss nan", "time": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "found format text", "step 5: eval_loss 1.235", "step 5: saved step-00000005", "warning: loss nan",
    ]  # fmt: skip


def test_the_line_of_a_step():
    text = describe_step(step(30), 120, 3725.0)
    assert text == "step 30/120  loss 2.346  lr 0.001  12.3k tokens/s  1h02m left  2.5 GB"
    assert describe_step({"step": 3}, None, None) == "step 3"
    assert "left" not in describe_step(step(120), 120, 0.0)
    assert "loss nan" in describe_step(step(1, loss=float("nan")), None, 61.0)
    assert "1m01s left" in describe_step(step(1), 2, 61.0)


@pytest.mark.parametrize("event", [{"event": "checkpoint", "step": 1, "name": None}, {"event": "notice"}, {"event": "new"}, {}])
def test_incomplete_events_are_no_error(event):
    assert isinstance(describe(event), str)


def test_time_left_is_from_this_start(capsys, monkeypatch):
    """After resuming at 500 the first 500 steps do not count as fast ones."""
    clock = Clock(monkeypatch)
    screen = Console()
    screen.set_total(1000)
    screen.event(step(501))
    clock.now += 10.0
    screen.event(step(502))
    assert "1h23m left" in capsys.readouterr().err


class Broken(io.StringIO):
    def __init__(self, error) -> None:
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text):
        self.tries += 1
        raise self.error

    def isatty(self):
        return False


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error"), ValueError("I/O on closed file")])
def test_a_closed_terminal_only_ends_the_output(monkeypatch, error):
    """F27."""
    stream = Broken(error)
    monkeypatch.setattr(sys, "stderr", stream)
    screen = Console(total=10)
    for n in range(1, 11):
        screen.event(step(n))
        screen.event({"event": "notice", "text": "x"})
    screen.close()
    assert stream.tries == 1


def test_no_stderr_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    screen = Console()
    screen.event(step(1))
    screen.event({"event": "notice", "text": "x"})
    screen.close()


SHOW = (
    "from metier.core.console import Console\n"
    "c = Console()\n"
    "c.set_total(20)\n"
    "for n in range(1, 21):\n"
    "    c.event({'event': 'step', 'step': n, 'loss': 1.5, 'lr': 0.1})\n"
    "    if n == 10: c.event({'event': 'notice', 'text': '[red]half way[/red]'})\n"
    "c.close()\n"
    "c.close()\n"
)


def on_terminal(**environment: str) -> str:
    """stderr of a real process on a pseudo terminal; stdout must stay empty."""
    main, side = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "FORCE_COLOR")} | environment
    child = subprocess.Popen([sys.executable, "-c", SHOW], stdout=subprocess.PIPE, stderr=side, env=env)
    os.close(side)
    out = b""
    try:
        while block := os.read(main, 65536):
            out += block
    except OSError:  # the other end is closed
        pass
    os.close(main)
    stdout, _ = child.communicate()
    assert child.returncode == 0, out
    assert stdout == b""
    return out.decode()


def test_a_live_line_on_a_terminal():
    text = on_terminal(TERM="xterm-256color", COLUMNS="100")
    assert "step 20/20" in text
    assert "[red]half way[/red]" in text, "text of events is not markup"
    assert "\x1b[" in text
    assert text.rstrip().endswith(("\x1b[2K", "\x1b[?25h")) or "step 20/20" not in text.rsplit("\x1b[2K", 1)[1], (
        "the live line goes away"
    )


def test_no_color_is_respected():
    import re

    text = on_terminal(TERM="xterm-256color", NO_COLOR="1", COLUMNS="100")
    assert "step 20/20" in text
    colours = [m for m in re.findall(r"\x1b\[([0-9;]*)m", text) if re.search(r"(^|;)(3[0-9]|4[0-9]|9[0-7])(;|$)", m)]
    assert not colours


def test_a_dumb_terminal_gets_plain_lines():
    text = on_terminal(TERM="dumb")
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith("step 1/20")


def test_importing_is_light():
    names = ", ".join(f"metier.core.{n}" for n in ("console", "signals", "lock", "guards", "log"))
    code = f"import sys, {names}\n"
    code += "print(sorted({'torch', 'rich', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
