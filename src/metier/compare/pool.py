"""Where jobs run: worker processes that respect the cores, or Ray. Results arrive as they finish."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from metier.compare.jobs import Job, execute
from metier.compare.results import RunResult


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def start_worker(threads: int) -> None:
    """Give one worker its share of the cores; the terminal's Ctrl-C is the parent's business."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def run_jobs(
    jobs: Sequence[Job], *, parallel: int, crashed: Callable[[Job, str], RunResult], run: Callable[[Job], RunResult] = execute
) -> Iterator[tuple[Job, RunResult]]:
    """Execute jobs on ``parallel`` processes, yielding each as it ends.

    A worker that dies takes its jobs with it: they are given to ``crashed``, and a new pool goes on with the rest.
    """
    waiting = list(jobs)
    while waiting:
        pool = _pool(parallel)
        running: dict[Future, Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running[pool.submit(run, job)] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    yield job, future.result()
        except BrokenProcessPool:
            lost = [job, *running.values()]  # type: ignore[possibly-undefined]
            for each in lost:
                yield each, crashed(each, "the worker process died (out of memory?)")
        except (KeyboardInterrupt, GeneratorExit):
            _terminate(pool)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pool(parallel: int) -> ProcessPoolExecutor:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, min(cores() // parallel, int(wanted) if wanted.isdigit() else cores()))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return ProcessPoolExecutor(parallel, mp_context=get_context("spawn"), initializer=start_worker, initargs=(threads,))


def _terminate(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()


def run_jobs_on_ray(jobs: Sequence[Job], *, cpus_per_job: int = 1) -> Iterator[tuple[Job, RunResult]]:
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
    pending = {remote.remote(job): job for job in jobs}
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            yield pending.pop(ready), ray.get(ready)
    finally:
        if ours:
            ray.shutdown()
