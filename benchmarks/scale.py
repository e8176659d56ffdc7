"""Attention and scans over processes of this machine, beside torch in one: time, bytes, and the fitted cost model.

python benchmarks/scale.py [--ranks 2] [--lengths 1024,2048,4096] [--peers]

For each length and method: seconds of forward and backward, the ratio to one process (torch's fused kernel for
attention, attnlab's own scan), what a rank sent, and what the model that was fitted to all runs says. `--peers` adds
torch's own context parallelism in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from attnlab import scale, scan
from attnlab.patterns import Causal
from attnlab.scale import Layout
from attnlab.scale.plan import MACHINES, Model, Run, Work, fit, softmax_layer

BATCH, HEADS, DIM, REPEATS = 1, 4, 64, 3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHAPE = Model(dim=HEADS * DIM, depth=1, heads=HEADS, kv_heads=HEADS)


def timed(call, clock: str) -> float:
    """The best of a few runs, after one to warm up: what else runs on the machine only adds."""
    call()
    found = []
    for _ in range(REPEATS):
        if dist.is_initialized():
            dist.barrier()
        start = CLOCKS[clock]()
        call()
        if dist.is_initialized() and clock == "wall":
            dist.barrier()
        found.append(CLOCKS[clock]() - start)
    return min(found)


def heads(n: int) -> list[torch.Tensor]:
    return [torch.randn(BATCH, HEADS, n, DIM, requires_grad=True) for _ in range(3)]


def alone(lengths: list[int], threads: int, clock: str) -> dict[str, dict[int, float]]:
    torch.set_num_threads(threads)
    found: dict[str, dict[int, float]] = {"attention": {}, "scan": {}}
    for n in lengths:
        q, k, v = heads(n)
        found["attention"][n] = timed(
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward(), clock
        )
        found["scan"][n] = timed(lambda q=q, k=k, v=v: scan(q, k, v)[0].sum().backward(), clock)
    return found


def rank(index: int, ranks: int, lengths: list[int], peers: bool, clock: str, port: int, path: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=index, world_size=ranks)
    group = dist.group.WORLD
    traffic, rows = scale.traffic(group), []
    for n in lengths:
        for method in ("ring", "allgather", "ulysses", "lasp2"):
            layout = Layout.contiguous(n, ranks) if method in ("ulysses", "lasp2") else Layout.zigzag(n, ranks)
            q, k, v = heads(layout.lengths[index])

            def call(q=q, k=k, v=v, method=method, layout=layout):
                traffic.clear()
                if method == "lasp2":
                    out = scale.scan(q, k, v, mesh=group, layout=layout)
                else:
                    out = scale.attend(q, k, v, mesh=group, method=method, layout=layout, pattern=Causal())
                out.sum().backward()

            rows.append((method, n, timed(call, clock), traffic.sent, sum(traffic.calls.values())))
        if peers and (seconds := torchs_own(n, ranks, index)):
            rows.append(("torch", n, seconds, 0, 0))
    if index == 0:
        Path(path).write_text(json.dumps(rows))
    dist.destroy_process_group()


def torchs_own(n: int, ranks: int, index: int) -> float:
    """torch.distributed.tensor.experimental.context_parallel, if this build has it for this device; else 0."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental import context_parallel

        mesh = init_device_mesh("cpu", (ranks,))
        q, k, v = heads(n)

        def call():
            with context_parallel(mesh, buffers=[x.detach() for x in (q, k, v)], buffer_seq_dims=[2, 2, 2]):
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        return timed(call, "wall")
    except Exception as error:
        if index == 0:
            print(f"torch's own, {n} tokens: {str(error).splitlines()[0][:110]}", file=sys.stderr)
        return 0.0


def work(method: str, n: int, ranks: int) -> Work:
    """What one rank does by the formulas."""
    if method == "lasp2":
        flops = 3.0 * 4 * BATCH * HEADS * (n / ranks) * DIM * (64 + DIM)
        return Work(flops, 2.0 * (ranks - 1) * BATCH * HEADS * DIM * DIM * 4, 2)
    parts = softmax_layer(method, ranks, n, BATCH, SHAPE, MACHINES["h100"], width=4)
    return Work(sum(p.flops for p in parts), sum(p.sent for p in parts), sum(p.messages for p in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: seconds of a rank's processor, where others use the machine",
    )
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.json")
        mp.start_processes(
            rank, (args.ranks, lengths, args.peers, args.clock, port, path), nprocs=args.ranks, start_method="fork"
        )  # fmt: skip
        rows = json.loads(Path(path).read_text())
    single = alone(lengths, 1 if args.clock == "cpu" else os.cpu_count() or 1, args.clock)
    ours = [row for row in rows if row[0] != "torch"]
    runs = {name: [Run(work(m, n, args.ranks), s) for m, n, s, *_ in ours if (m == "lasp2") == name] for name in (0, 1)}
    machines = {name: fit(found, memory=8e9) for name, found in runs.items()}
    print(
        f"{args.ranks} ranks, {os.cpu_count()} cores, {args.clock} time; "
        f"batch {BATCH}, {HEADS} heads of {DIM}, float32, causal"
    )
    for name, m in (("attention", machines[0]), ("scan", machines[1])):
        print(
            f"fitted, {name}: {m.rate / 1e9:.1f} GFLOP/s, {m.inside / 1e9:.2f} GB/s, {1e6 * m.latency:.0f} µs a message"
        )
    print(
        f"{'method':10} {'tokens':>7} {'ms':>8} {'of one process':>15} {'model, ms':>10} {'sent, kB':>9} {'calls':>6}"
    )
    for method, n, seconds, sent, calls in rows:
        one = single["scan" if method == "lasp2" else "attention"][n]
        said = (
            "" if method == "torch" else f"{1e3 * work(method, n, args.ranks).seconds(machines[method == 'lasp2']):.1f}"
        )
        print(f"{method:10} {n:7d} {1e3 * seconds:8.1f} {seconds / one:14.2f}× {said:>10} {sent / 1e3:9.1f} {calls:6d}")
    off = [abs(work(m, n, args.ranks).seconds(machines[m == "lasp2"]) / s - 1) for m, n, s, *_ in ours]
    print(f"the model is off by {statistics.median(off):.0%} in the median, {max(off):.0%} at most")


if __name__ == "__main__":
    main()
