"""One case of the benchmark of context parallelism, run by processes of this machine.

Reads the case as JSON from standard input and writes a point per length to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from attnlab import scale
from attnlab.arena.bench.longca import shape
from attnlab.arena.measure import seconds_of
from attnlab.attend import attend
from attnlab.patterns import Causal, Pattern
from attnlab.scale import Layout
from attnlab.scan import scan

TORCHS = "torch context_parallel"
LASP2 = "lasp2"


def main() -> None:
    case = json.load(sys.stdin)
    if case["method"] == "one process":
        torch.set_num_threads(case["threads"])
        points = [_alone(case, length) for length in case["lengths"]]
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_rank, (case, folder), nprocs=case["ranks"], start_method="spawn")
            points = json.loads(Path(folder, "points.json").read_text())
    json.dump(points, sys.stdout)


def _inputs(case: dict, length: int) -> list[Tensor]:
    """q, k, v of the whole sequence, the same on every rank."""
    rng = torch.Generator().manual_seed(length)
    return [torch.randn(1, case["heads"], length, case["head_dim"], generator=rng) for _ in range(3)]


def _both(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    upstream = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(call(*leaves), leaves, upstream)


def _alone(case: dict, length: int) -> dict:
    inputs, where = _inputs(case, length), _pattern(case, length)
    run = _both(_whole(case, where), inputs)
    run()
    return {"length": length, "seconds": seconds_of(run, "cpu"), "sent": 0, "balance": 1.0}


def _pattern(case: dict, length: int) -> Pattern:
    return Causal() if case["mask"] == "state" else shape(case, length)[0]


def _whole(case: dict, where: Pattern) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What one process computes: attention under the mask, or the scan of a state."""
    if case["mask"] == "state":
        return lambda q, k, v: scan(q, k, v)[0]
    return lambda q, k, v: attend(q, k, v, pattern=where)


def _rank(index: int, case: dict, folder: str) -> None:
    torch.set_num_threads(max(1, case["threads"] // case["ranks"]))
    ranks = case["ranks"]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=ranks, timeout=timedelta(seconds=120)
    )
    points = [_spread(case, length, index, ranks) for length in case["lengths"]]
    if index == 0:
        Path(folder, "points.json").write_text(json.dumps(points))
    dist.destroy_process_group()


def _spread(case: dict, length: int, index: int, ranks: int) -> dict:
    method, where, whole = case["method"], _pattern(case, length), _inputs(case, length)
    if method == TORCHS:
        return _torchs(case, length, whole, ranks)
    contiguous = method in ("ulysses", LASP2)
    layout = Layout.contiguous(length, ranks) if contiguous else Layout.balanced(where, length, ranks)
    mine = [layout.shard(x, index) for x in whole]
    if method == "usp":
        meshes = dist.init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("ring", "group"))
        mesh: Any = (meshes["ring"], meshes["group"])
        groups = [meshes["ring"].get_group(), meshes["group"].get_group()]
    else:
        mesh = dist.group.WORLD
        groups = [mesh]
    wires = [scale.traffic(group) for group in groups]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if method == LASP2:
            return scale.scan(q, k, v, mesh=mesh, layout=layout)
        window = ranks // 2 if method == "double ring" else None
        named = "ring" if window else method
        return scale.attend(q, k, v, mesh=mesh, method=named, layout=layout, pattern=where, window=window)

    run = _both(call, mine)
    run()
    for wire in wires:
        wire.clear()
    run()
    sent = torch.tensor(sum(wire.sent for wire in wires))
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    with torch.no_grad():
        off = (call(*mine) - layout.shard(_whole(case, where)(*whole), index)).abs().max()
    dist.all_reduce(off, dist.ReduceOp.MAX)
    work = layout.work(where)
    balance = max(work) * len(work) / sum(work) if method not in ("ulysses", "usp", LASP2) else 1.0
    return {
        "length": length, "seconds": _slowest(run), "sent": int(sent), "balance": balance, "deviation": float(off),
    }  # fmt: skip


def _torchs(case: dict, length: int, whole: list[Tensor], ranks: int) -> dict:
    """torch's own context parallelism, where this build has it for this device."""
    try:
        from torch.distributed.tensor.experimental import context_parallel

        if case["mask"] not in ("full", "causal"):
            raise ValueError("torch's context_parallel is full or causal")
        mesh = dist.init_device_mesh("cpu", (ranks,))
        q, k, v = (x.clone().requires_grad_() for x in whole)

        def run() -> None:
            with context_parallel(mesh, buffers=[x.detach() for x in (q, k, v)], buffer_seq_dims=[2, 2, 2]):
                F.scaled_dot_product_attention(q, k, v, is_causal=case["mask"] == "causal").sum().backward()

        run()
        return {"length": length, "seconds": _slowest(run)}
    except Exception as error:  # what a peer raises is its result
        return {"length": length, "reason": str(error).splitlines()[0][:200]}


def _slowest(run: Callable[[], Any]) -> float:
    """The least disturbed of three runs, each as long as its slowest rank."""
    times = []
    for _ in range(3):
        dist.barrier()
        took = torch.tensor(_once(run))
        dist.all_reduce(took, dist.ReduceOp.MAX)
        times.append(float(took))
    return min(times)


def _once(run: Callable[[], Any]) -> float:
    import time

    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
