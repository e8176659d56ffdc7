"""The trials of a study on a Ray cluster: where a worker dies, its trial is tried again on another."""

from __future__ import annotations

import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attnlab.arena.jobs import Job, failed, load_files
from attnlab.arena.pool import Event, side_by_side

_TRIES = 3  # of a trial whose worker dies, before the trial is held to be what kills it
_LISTEN_EVERY = 0.5  # seconds


def connect(address: str, workers: int | None = None) -> Callable[[], None]:
    """Join the cluster at `address`, or start one on this machine ("local"); what is returned leaves it again.

    A program that is in a cluster already stays in it: `address` must then be its own, or "auto".

    Raises:
        ImportError: naming the extra, without Ray. ConnectionError: there is no cluster at `address`, or the program
            is in another.
    """
    ray = _ray()
    if ray.is_initialized():
        own = ray.get_runtime_context().gcs_address
        if address not in ("auto", own):
            raise ConnectionError(f"ray: this program is in the cluster at {own!r}, and {address!r} is another")
        return lambda: None
    options: dict[str, Any] = dict(log_to_driver=False, configure_logging=False)
    if address == "local":
        ray.init(address="local", num_cpus=workers or side_by_side("cpu"), include_dashboard=False, **options)
    else:
        try:
            _knock(address)
            ray.init(address=address, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConnectionError(f"ray: no cluster answers at {address!r} ({error})") from None
    return ray.shutdown


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would knock for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def perform(jobs: Iterable[Job], *, threads: int, load: Sequence[str] = ()) -> Iterator[Event]:
    """Does all jobs on the cluster that is connected, as many at a time as it has cores (one per GPU for CUDA).

    The files of `load` travel with the job; a `data` path must be there on every machine of the cluster.
    """
    ray = _ray()
    waiting = deque(jobs)
    files = {Path(path).name: Path(path).read_text() for path in load}
    board = ray.remote(num_cpus=0)(_Board).remote()
    running: dict[Any, Job] = {}
    begun: set[str] = set()
    limit = max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                job = waiting.popleft()
                gpus = 1 if job.device.startswith("cuda") else 0
                task = ray.remote(_perform).options(num_cpus=1, num_gpus=gpus, max_retries=_TRIES - 1)
                running[task.remote(job, board, threads, files)] = job
            ended, _ = ray.wait(list(running), timeout=_LISTEN_EVERY)
            for key, fraction in _heard(ray, board).items():
                for job in [j for j in running.values() if j.key == key]:
                    begun.add(key)
                    yield Event(job, fraction)
            for task in ended:
                job = running.pop(task)
                if job.key not in begun:
                    yield Event(job)
                yield Event(job, 1.0, _result(ray, task, job))
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _result(ray: Any, task: Any, job: Job) -> dict:
    """A job's record. What is wrong with the data or the request is raised, as it is without a cluster."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = f"{_TRIES} workers ended while doing it: {type(error).__name__}"
        return failed(job, reason)


def _heard(ray: Any, board: Any) -> dict[str, float]:
    try:
        return ray.get(board.read.remote(), timeout=_LISTEN_EVERY)
    except ray.exceptions.RayError:
        return {}  # the machine with the board is gone or slow: the study goes on without bars


class _Board:
    """Where the workers write how far they are."""

    def __init__(self) -> None:
        self.fractions: dict[str, float] = {}

    def write(self, key: str, fraction: float) -> None:
        self.fractions[key] = fraction

    def read(self) -> dict[str, float]:
        news, self.fractions = self.fractions, {}
        return news


def _perform(job: Job, board: Any, threads: int, files: dict[str, str]) -> dict:
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, text in files.items():
            paths.append(Path(folder, name))
            paths[-1].write_text(text)
        load_files(paths)
    last = time.monotonic()
    board.write.remote(job.key, 0.0)

    def progress(fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _LISTEN_EVERY:
            last = time.monotonic()
            board.write.remote(job.key, fraction)

    return job.perform(progress)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ImportError("a cluster needs Ray: pip install 'attnlab[ray]'") from None
    return ray
