"""How ranks talk: a few messages over `torch.distributed`, each one counted and each one with a time limit."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from attnlab.scale import faults

AGREEMENT = "agreement"


@dataclass
class Traffic:
    """What one rank has sent since the last `clear`: bytes to other ranks, and calls, by kind.

    A collective counts what the rank's own part costs to bring to all who want it: R − 1 copies for an all-gather. The
    question whether all agree, asked once for each kind of call, is a kind of its own and not part of `sent`.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def sent(self) -> int:
        return sum(n for kind, n in self.bytes.items() if kind != AGREEMENT)

    def add(self, kind: str, count: int) -> None:
        self.bytes[kind] += count
        self.calls[kind] += 1

    def clear(self) -> None:
        self.bytes.clear()
        self.calls.clear()

    def __str__(self) -> str:
        parts = (f"{kind}: {self.calls[kind]} calls, {self.bytes[kind]:,} bytes" for kind in sorted(self.calls))
        return "; ".join(parts) or "nothing sent"


class Wire(ABC):
    """The ranks of one group: `rank` of `size`. All ranks make the same calls in the same order."""

    rank: int
    size: int
    device: torch.device | None = None  # where messages must lie, if it matters

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.agreed: dict[object, dict[str, list[int]]] = {}  # the lengths of what all ranks were found to agree about

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Start to send tensors to ranks and to receive from ranks into tensors; what is returned waits for the end."""
        faults.arrive("exchange")
        if sends or receives:
            self.traffic.add("exchange", sum(x.numel() * x.element_size() for _, x in sends))
        return self._exchange([(r, x.contiguous()) for r, x in sends], receives)

    def all_gather(self, x: Tensor, kind: str = "all_gather") -> list[Tensor]:
        """Everyone's `x`, all of one shape."""
        faults.arrive(kind)
        self.traffic.add(kind, (self.size - 1) * x.numel() * x.element_size())
        return self._all_gather(x.contiguous())

    def all_to_all(self, parts: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        """Send `parts[r]` to each rank r, and fill `wanted[r]` with what it sent."""
        faults.arrive("all_to_all")
        elsewhere = sum(x.numel() * x.element_size() for r, x in enumerate(parts) if r != self.rank)
        self.traffic.add("all_to_all", elsewhere)
        self._all_to_all([x.contiguous() for x in parts], wanted)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of everyone's `x`, on every rank."""
        faults.arrive("all_reduce")
        self.traffic.add("all_reduce", 2 * (self.size - 1) * x.numel() * x.element_size() // self.size)
        return self._all_reduce(x.contiguous())

    @abstractmethod
    def _exchange(self, sends: list[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Any: ...

    @abstractmethod
    def _all_gather(self, x: Tensor) -> list[Tensor]: ...

    def _all_to_all(self, parts: list[Tensor], wanted: Sequence[Tensor]) -> None:
        others = [r for r in range(self.size) if r != self.rank]
        wanted[self.rank].copy_(parts[self.rank])
        self._exchange(
            [(r, parts[r]) for r in others if parts[r].numel()], [(r, wanted[r]) for r in others if wanted[r].numel()]
        )()

    def _all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._all_gather(x)).sum(0)


class Distributed(Wire):
    """The ranks of a `torch.distributed` process group."""

    def __init__(self, group: dist.ProcessGroup, timeout: float | None = None) -> None:
        super().__init__()
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.names = [dist.get_global_rank(group, r) for r in range(self.size)]
        if "nccl" in dist.get_backend(group):
            self.device = torch.device("cuda", torch.cuda.current_device())

    def _wait(self, works: Sequence[dist.Work], what: str, others: Sequence[int]) -> None:
        # With a limit, NCCL would make the host wait for what is to overlap; there its own watchdog keeps the time.
        limit = None if self.timeout is None or self.device is not None else timedelta(seconds=self.timeout)
        try:
            for work in works:
                work.wait() if limit is None else work.wait(limit)
        except RuntimeError as error:
            raise faults.diagnose(error, what, [self.names[r] for r in others]) from error

    def _exchange(self, sends: list[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Any:
        ops = [dist.P2POp(dist.isend, x, self.names[r], self.group) for r, x in sends]
        ops += [dist.P2POp(dist.irecv, x, self.names[r], self.group) for r, x in receives]
        others = sorted({r for r, _ in (*sends, *receives)})
        try:
            works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise faults.diagnose(error, "exchange", [self.names[r] for r in others]) from error
        # `sends` must outlive the sending.
        return lambda: self._wait(works, "exchange", others) if sends or receives else None

    def _collective(self, what: str, start: Callable[[], dist.Work]) -> None:
        others = [r for r in range(self.size) if r != self.rank]
        try:
            work = start()
        except RuntimeError as error:
            raise faults.diagnose(error, what, [self.names[r] for r in others]) from error
        self._wait([work], what, others)

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        self._collective("all_gather", lambda: dist.all_gather(found, x, group=self.group, async_op=True))
        return found

    def _all_to_all(self, parts: list[Tensor], wanted: Sequence[Tensor]) -> None:
        out = wanted[0].new_empty(sum(x.numel() for x in wanted))
        given = torch.cat([x.flatten() for x in parts])
        self._collective(
            "all_to_all",
            lambda: dist.all_to_all_single(
                out, given, [x.numel() for x in wanted], [x.numel() for x in parts], group=self.group, async_op=True
            ),
        )
        for x, piece in zip(wanted, out.split([x.numel() for x in wanted]), strict=True):
            x.copy_(piece.view(x.shape))

    def _all_reduce(self, x: Tensor) -> Tensor:
        x = x.clone()
        self._collective("all_reduce", lambda: dist.all_reduce(x, group=self.group, async_op=True))
        return x


Mesh = DeviceMesh | dist.ProcessGroup | Wire
_wires: WeakKeyDictionary[Any, Distributed] = WeakKeyDictionary()
_lock = threading.Lock()


def wire(mesh: Mesh) -> Wire:
    """The ranks of a one-dimensional `DeviceMesh` (`mesh["cp"]` of a larger one), or of a process group."""
    if isinstance(mesh, Wire):
        return mesh
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh must be one dimension, such as mesh['cp'], got {mesh.mesh_dim_names or mesh.ndim}")
        mesh = mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    with _lock:
        if mesh not in _wires:
            _wires[mesh] = Distributed(mesh)
        return _wires[mesh]


def both(mesh: Any) -> tuple[Wire, Wire]:
    """The outer and the inner ranks of a mesh of two dimensions, or of a pair of meshes."""
    if isinstance(mesh, DeviceMesh) and mesh.ndim == 2:
        return tuple(wire(mesh.get_group(i)) for i in range(2))  # type: ignore[return-value]
    if isinstance(mesh, tuple) and len(mesh) == 2:
        return wire(mesh[0]), wire(mesh[1])
    raise ValueError(f"mesh must have two dimensions, the ring's and the groups', got {mesh}")


def traffic(mesh: Mesh) -> Traffic:
    """What this rank has sent over `mesh` since `traffic(mesh).clear()`."""
    return wire(mesh).traffic
