"""A process that has imported everything and forks for each command it reads.

Reads a JSON object per line, ``{"argv": [...], "log": path, "inject": {...} | null}``; prints the pid, then
the exit code. ``inject`` makes the child send itself ``signal`` (``times`` times) at the ``n``-th entry of
``where``.
"""

import json
import os
import signal
import sys


def inject(where: str, n: int, number: int, times: int) -> None:
    """Patch ``where`` so that the signal arrives exactly there."""
    from metier.core import files, log, loop, lossmodule

    owner, name = {
        "forward": (lossmodule.LossModule, "forward"),
        "save": (files, "fsync"),
        "rename": (files, "replace"),
        "eval": (loop.Loop, "evaluate"),
        "start": (log.RunLog, "start"),
    }[where]
    real, calls = getattr(owner, name), [0]

    def patched(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, patched)


def child(job: dict) -> None:
    """Run the command line; does not return."""
    from metier.cli import main

    code = 1
    try:
        fd = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if job["inject"]:
            inject(**job["inject"])
        main(job["argv"])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Fork for each line of standard input."""
    import torch

    from metier.core import checkpoint, log, models, optim, scores  # noqa: F401
    from metier.core.data import pipeline  # noqa: F401

    torch.set_num_threads(1)
    models.load("lab/llama-50k")
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
