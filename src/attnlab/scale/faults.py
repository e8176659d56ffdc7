"""A rank that dies or hangs: every other rank gets an error that names it, within the time that was allowed.

Each rank's heartbeat thread writes to the job's store how far it has come. Whoever waits in vain reads what the others
wrote: who no longer beats is gone; who beats but lies behind hangs.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_NETWORK = re.compile(
    r"timed? ?out|connection (closed|reset|refused)|broken pipe|peer|socket|network|aborted|store|sent nothing", re.I
)


class RankLost(RuntimeError):
    """Other ranks are gone or hang; `ranks` are their numbers in the whole job (empty where nobody knows)."""

    def __init__(self, ranks: Sequence[int], reason: str) -> None:
        self.ranks, self.reason = tuple(ranks), reason
        names = " and ".join(map(str, self.ranks)) or "?"
        super().__init__(f"rank{'s' if len(self.ranks) > 1 else ''} {names} lost: {reason}")


class _Progress:
    """How many calls this process has begun, and which was the last."""

    count, what = 0, "the start"


_progress = _Progress()
_watches: list[_Watch] = []


def arrive(what: str) -> None:
    """Note that this process begins a call that all ranks make."""
    _progress.count += 1
    _progress.what = what


def diagnose(error: BaseException, what: str, others: Sequence[int]) -> BaseException:
    """The error that names who is lost, or `error` itself if it is about something else."""
    if isinstance(error, RankLost) or not (isinstance(error, dist.DistError) or _NETWORK.search(str(error))):
        return error
    first = str(error).strip().splitlines()[0][:200]
    if _watches:
        return _watches[-1].blame(what, first)
    return RankLost(others if len(others) == 1 else (), f"{what} with ranks {list(others)} failed: {first}")


class _Watch:
    def __init__(self, timeout: float, every: float) -> None:
        self.timeout, self.every = timeout, every
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        if hasattr(store, "clone"):
            store = store.clone()  # a connection of its own, which no waiting call holds
        self.store = dist.PrefixStore("attnlab_watch", store)
        self.store.set_timeout(timedelta(seconds=max(1.0, 4 * every)))
        self.beats, self.vain, self.closed = 0, False, threading.Event()
        self.beat()
        self.thread = threading.Thread(target=self._run, name="attnlab heartbeat", daemon=True)
        self.thread.start()

    def beat(self) -> None:
        self.beats += 1
        self.store.set(f"beat/{self.rank}", f"{self.beats} {_progress.count} {int(self.vain)} {_progress.what}")

    def _run(self) -> None:
        while not self.closed.wait(self.every):
            try:
                self.beat()
            except RuntimeError:
                return  # the store is gone, which whoever waits will find out

    def _read(self) -> dict[int, tuple[int, int, int, str]]:
        found = {}
        for r in range(self.size):
            if self.store.check([f"beat/{r}"]):
                beats, count, vain, what = self.store.get(f"beat/{r}").decode().split(" ", 3)
                found[r] = (int(beats), int(count), int(vain), what)
        return found

    def blame(self, what: str, error: str) -> RankLost:
        """Find out who is lost; the first to find out tells the others."""
        try:
            self.vain = True
            self.beat()
            before = self._read()
            time.sleep(2.5 * self.every)
            if self.store.check(["lost"]):
                ranks, _, reason = self.store.get("lost").decode().partition("|")
                return RankLost([int(r) for r in ranks.split()], reason)
            now = self._read()
            others = [r for r in range(self.size) if r != self.rank]
            gone = [r for r in others if r not in now or now[r][0] == before.get(r, (0,))[0]]
            if gone:
                lost, reason = gone, f"no heartbeat; others waited in {what} ({error})"
            else:
                furthest = max(x[1] for x in now.values())
                behind = min(x[1] for x in now.values())
                slow = [r for r in others if now[r][1] == behind and not now[r][2]]
                lost = slow if behind < furthest or len(slow) < len(others) else []
                calls = ", ".join(f"rank {r} at call {now[r][1]} ({now[r][3]})" for r in lost)
                reason = (
                    f"alive but behind: {calls or 'nobody can say who'}, while others wait at call {furthest} ({what})"
                )
            if lost:
                self.store.set("lost", " ".join(map(str, lost)) + "|" + reason)
            return RankLost(lost, reason)
        except RuntimeError as broken:
            return RankLost([], f"{what} failed ({error}), and the job's store is gone: {str(broken).splitlines()[0]}")

    def close(self) -> None:
        self.closed.set()
        self.thread.join(self.every)


@contextmanager
def watch(*meshes: Any, timeout: float = 60.0, every: float | None = None) -> Iterator[None]:
    """Inside, a rank that dies or hangs is a `RankLost` on every other rank, after at most about `timeout` seconds.

        with scale.watch(mesh["cp"], timeout=30):
            train()

    Whatever waits on another rank is watched: the calls of `attnlab.scale` over `meshes`, and also those of DDP and
    FSDP, whose errors are turned into `RankLost` here. The process groups themselves get the same time limit.

    Args:
        meshes: the dimensions whose process groups get the limit; the default group always does.
        timeout: seconds that a rank may be behind the others. Longer than the slowest step and checkpoint.
        every: seconds between heartbeats; timeout/10, at most 2, if None.
    """
    from attnlab.scale.wire import Distributed, wire

    if timeout <= 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    every = min(timeout / 10, 2.0) if every is None else every
    # Waiting and then finding out whom for must both fit.
    limit = max(0.5 * timeout, timeout - 4 * every)
    wires = [wire(mesh) for mesh in meshes]
    groups = [w.group for w in wires if isinstance(w, Distributed)]
    for group in (None, *groups):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=limit), group)
    for one in wires:
        if isinstance(one, Distributed):
            one.timeout = limit
    active = _Watch(timeout, every)
    _watches.append(active)
    try:
        yield
    except RuntimeError as error:
        named = diagnose(error, _progress.what, [])
        if named is error:
            raise
        raise named from error
    finally:
        _watches.remove(active)
        active.close()
