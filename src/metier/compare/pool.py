"""Where jobs run: worker processes that respect the cores, or Ray. Results arrive as they finish."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from types import FrameType

from metier.compare.jobs import Job, execute
from metier.compare.results import RunResult

LOOK = 0.2
"""Seconds between two looks at whether a signal has come."""
GRACE = 5.0
"""Seconds a worker has to end before it is killed."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def start_worker(threads: int) -> None:
    """Give one worker its share of the cores; the terminal's Ctrl-C is the parent's business, its death is the worker's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process with the one that started it, however that ends: nobody would take the results."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Sigterm:
    """While entered, SIGTERM is what :meth:`check` raises, as ``SystemExit(143)``, between two looks at the workers.

    A second one ends the process at once, as does the first where nothing is installed: outside the main thread, or where
    the program has a handler of its own, which is kept.
    """

    def __init__(self) -> None:
        self.requested = self.installed = False

    def __enter__(self) -> "_Sigterm":
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._handle)
            self.installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # to the descriptor: a handler may run in the middle of another write
            os.write(2, b"\nmetier: SIGTERM: stopping; finished runs are kept, and the same command continues\n")

    def check(self) -> None:
        """Raise ``SystemExit`` once SIGTERM has come."""
        if self.requested:
            raise SystemExit(128 + signal.SIGTERM)


def run_jobs(
    jobs: Sequence[Job], *, parallel: int, crashed: Callable[[Job, str], RunResult], run: Callable[[Job], RunResult] = execute
) -> Generator[tuple[Job, RunResult]]:
    """Execute jobs on ``parallel`` processes, yielding each as it ends; ``jobs`` may grow between two results.

    A worker that dies takes its jobs with it: they are given to ``crashed``, and a new pool goes on with the rest. On
    Ctrl-C, SIGTERM, an error, or when the generator is closed, the workers are stopped in the middle of their runs.
    """
    begun = 0
    with _Sigterm() as stop:
        while begun < len(jobs):
            pool = _pool(parallel)
            running: dict[Future, Job] = {}
            try:
                while running or begun < len(jobs):
                    while begun < len(jobs) and len(running) < parallel:
                        running[pool.submit(run, jobs[begun])] = jobs[begun]
                        begun += 1
                    done, _ = wait(running, timeout=LOOK, return_when=FIRST_COMPLETED)
                    stop.check()
                    for future in done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                stop.check()  # a signal to the whole process group ends the workers too
                for future, job in running.items():
                    yield job, _result_or(future, lambda job=job: crashed(job, "the worker process died (out of memory?)"))
            except BaseException:
                _stop(pool)
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _pool(parallel: int) -> ProcessPoolExecutor:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, min(cores() // parallel, int(wanted) if wanted.isdigit() else cores()))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return ProcessPoolExecutor(parallel, mp_context=get_context("spawn"), initializer=start_worker, initargs=(threads,))


def _result_or(future: Future, lost: Callable[[], RunResult]) -> RunResult:
    """What a job gave that ended before its pool broke, or what it lost."""
    return future.result() if future.done() and future.exception() is None else lost()


def _stop(pool: ProcessPoolExecutor) -> None:
    workers = list((pool._processes or {}).values())
    for worker in workers:
        worker.terminate()
    for worker in workers:
        if not connection.wait([worker.sentinel], GRACE):
            worker.kill()


def run_jobs_on_ray(jobs: Sequence[Job], *, cpus_per_job: int = 1) -> Generator[tuple[Job, RunResult]]:
    """The same on a Ray cluster (``metier[ray]``); the comparison folder must be on storage that all nodes share."""
    from metier.core.errors import UsageError

    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed", hint="pip install 'metier[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    remote = ray.remote(num_cpus=cpus_per_job, max_retries=0)(execute)
    pending, begun = {}, 0
    try:
        while pending or begun < len(jobs):
            pending |= {remote.remote(job): job for job in jobs[begun:]}
            begun = len(jobs)
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            yield pending.pop(ready), ray.get(ready)
    finally:
        if ours:
            ray.shutdown()
