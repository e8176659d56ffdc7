"""Worker processes that do jobs, and come to an end when the study does, however it ends.

A worker is a process of its own, so that a crash or a kill for memory costs one job, and two small trials on two cores
do not wait for each other. Each reports over its pipe; when the other end is gone (`kill -9` of the study), its next
report fails and it ends too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from attnlab.arena import memory
from attnlab.arena.jobs import Job, failed

_REPORT_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class Event:
    """A job began (fraction 0), got on, or ended (with its record)."""

    job: Job
    fraction: float = 0.0
    record: dict | None = None


def perform(jobs: Iterable[Job], *, workers: int, threads: int, load: Sequence[str] = ()) -> Iterator[Event]:
    """Does all jobs, `workers` at a time with `threads` threads each; with no workers, in this process."""
    if workers == 0:
        for job in jobs:
            yield Event(job)
            yield Event(job, 1.0, job.perform())
        return
    waiting = deque(jobs)
    pool = [_Worker(threads, load) for _ in range(min(workers, len(waiting)))]
    try:
        while waiting or any(worker.job for worker in pool):
            for i, worker in enumerate(pool):
                if worker.job is None and waiting:
                    if worker.dead():
                        pool[i] = worker = _Worker(threads, load)
                    yield Event(worker.give(waiting.popleft()))
            busy = {worker.pipe: worker for worker in pool if worker.job}
            for pipe in wait(list(busy), timeout=1.0):
                yield from busy[pipe].hear()  # type: ignore[index]
    finally:
        for worker in pool:
            worker.stop()


def side_by_side(device: str) -> int:
    """How many trials to run at a time: one on a GPU, else one per core as long as each has 2 GiB."""
    if device.startswith("cuda"):
        return 1
    return max(1, min(cores(), memory.available("cpu") // 2**31))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    def __init__(self, threads: int, load: Sequence[str]):
        context = multiprocessing.get_context("spawn")  # fork and torch's threads do not go together
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, threads, list(load)), daemon=True)
        self.job: Job | None = None
        with _deaf():
            self.process.start()
        theirs.close()

    def give(self, job: Job) -> Job:
        self.job = job
        with contextlib.suppress(OSError):  # it died in between: hear() will say so
            self.pipe.send(job)
        return job

    def hear(self) -> Iterator[Event]:
        job = self.job
        if job is None:
            return
        try:
            fraction, record, error = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            yield self._ended(Event(job, 1.0, _died(job, self.process.exitcode)))
            return
        if error:
            raise error
        yield self._ended(Event(job, 1.0, record)) if record else Event(job, fraction)

    def _ended(self, event: Event) -> Event:
        self.job = None
        return event

    def dead(self) -> bool:
        return not self.process.is_alive()

    def stop(self) -> None:
        self.pipe.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes started here do not hear Ctrl-C: it is for the study, which then stops its workers."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _died(job: Job, code: int | None) -> dict:
    reason = f"the worker ended with code {code}"
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        reason = f"the worker was killed ({name})" + (": most likely out of memory" if -code == signal.SIGKILL else "")
    return failed(job, reason)


def _work(pipe: Connection, threads: int, load: list[str]) -> None:
    """A worker's life: receives jobs, sends (fraction, record, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # see _deaf
    import torch

    from attnlab.arena.jobs import load_files

    torch.set_num_threads(threads)
    last = 0.0

    def progress(fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_EVERY:
            last = now
            pipe.send((fraction, None, None))

    try:
        load_files(load)
        while True:
            job = pipe.recv()
            try:
                record = job.perform(progress)
            except (ImportError, OSError, ValueError) as error:  # the data or the request, not the mechanism
                if isinstance(error, BrokenPipeError):
                    raise
                pipe.send((1.0, None, error))
                continue
            pipe.send((1.0, record, None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # nobody listens any more
