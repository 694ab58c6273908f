import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from metier.core.signals import KINDS, Stop


def handlers() -> list:
    return [signal.getsignal(kind) for kind in KINDS]


@pytest.fixture(autouse=True)
def usual_handlers():
    """As in a terminal, whatever started the tests."""
    before = {
        kind: signal.signal(kind, how) for kind, how in zip(KINDS, (signal.default_int_handler, signal.SIG_DFL), strict=True)
    }
    yield
    for kind, how in before.items():
        signal.signal(kind, how)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_signal_is_only_noted(kind, capfd):
    before = handlers()
    with Stop() as stop:
        assert (stop.requested, stop.signal) == (False, None)
        os.kill(os.getpid(), kind)
        assert stop.requested
        assert stop.signal == kind
        assert handlers() != before
    assert handlers() == before
    assert capfd.readouterr().err.count("stopping after this step; again to stop at once") == 1


def test_handlers_come_back_after_an_error():
    before = handlers()
    with pytest.raises(RuntimeError), Stop():
        raise RuntimeError
    assert handlers() == before


def test_the_second_interrupt_raises_at_once_and_the_handlers_are_back():
    before = handlers()
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert handlers() == before
    assert handlers() == before


def test_one_of_each_kind_is_not_two(capfd):
    """Launchers forward Ctrl-C and then send SIGTERM."""
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGINT
    assert capfd.readouterr().err.count("stopping") == 1


def test_disabled_or_in_a_thread_nothing_is_installed():
    before = handlers()
    with Stop(enabled=False) as stop:
        assert handlers() == before
    seen = []

    def work():
        with Stop() as inner:
            seen.append((handlers() == before, inner.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, False)]
    assert stop.signal is None


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_custom_handler_comes_back():
    def mine(number, frame): ...

    signal.signal(signal.SIGTERM, mine)
    with Stop():
        pass
    assert signal.getsignal(signal.SIGTERM) is mine


def test_a_closed_stderr_is_no_problem():
    code = (
        "import os, signal\n"
        "from metier.core.signals import Stop\n"
        "os.close(2)\n"
        "with Stop() as s:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(s.signal)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "15\n")


LOOP = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from metier.core.signals import Stop\n"
    "try:\n"
    "    with Stop() as s:\n"
    "        print('ready', flush=True)\n"
    "        while not s.requested: time.sleep(0.01)\n"
    "        print('noted', flush=True)\n"
    "        time.sleep(60)\n"
    "except KeyboardInterrupt:\n"
    "    sys.exit(130)\n"
)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_twice_ends_a_real_process_at_once(kind, code):
    child = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(kind)
    assert child.stdout.readline() == "noted\n"
    began = time.monotonic()
    child.send_signal(kind)
    assert child.wait(timeout=30) == code
    assert time.monotonic() - began < 10
    child.stdout.close()
