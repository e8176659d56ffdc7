"""The scan: chunked against recurrent and against fla's plain chunked form, and what a decode step costs.

    python benchmarks/scan.py [--threads 2] [--length 4096] [--heads 4] [--width 64]

Prints the shortest time of each over several runs and ratios: above 1, ours is faster. The peer needs
flash-linear-attention, installed or on PYTHONPATH; without it its rows say so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from attnlab import build, scan


def shortest(call: Callable[[], Any], runs: int = 5) -> float:
    """Milliseconds of the fastest of `runs` calls, after one that warms up."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def inputs(length: int, heads: int, width: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    q, k = (normalize(torch.randn(1, heads, length, width), dim=-1) for _ in range(2))
    found = {
        "q": q,
        "k": k,
        "v": torch.randn(1, heads, length, width),
        "decay": -0.1 * torch.rand(1, heads, length, width),
        "beta": torch.rand(1, heads, length),
    }
    return {n: t.requires_grad_() for n, t in found.items()}


Attention = Callable[[dict[str, Tensor]], Tensor]


def ours(backend: str) -> Attention:
    return lambda x: scan(**x, scale=x["q"].shape[-1] ** -0.5, backend=backend)[0]


def peer() -> Attention | str:
    """fla's naive_chunk_kda in our shapes, or the reason why it is absent."""
    package = find_spec("fla")
    if package is None or not package.submodule_search_locations:
        return "fla is not installed"
    # By its file: importing the package wants Triton, and this function does not.
    spec = spec_from_file_location("naive_kda", Path(package.submodule_search_locations[0]) / "ops/kda/naive.py")
    if spec is None or spec.loader is None:
        return "this fla has no ops/kda/naive.py"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    naive = module.naive_chunk_kda

    def run(x: dict[str, Tensor]) -> Tensor:
        heads = [t.transpose(1, 2) for t in (x["q"], x["k"], x["v"], x["decay"], x["beta"])]
        return naive(*heads)[0].transpose(1, 2)

    return run


def forward(attention: Attention, x: dict[str, Tensor], runs: int) -> float:
    with torch.no_grad():
        return shortest(lambda: attention(x), runs)


def both_ways(attention: Attention, x: dict[str, Tensor], runs: int) -> float:
    weight = torch.randn_like(x["v"])
    return shortest(lambda: torch.autograd.grad(attention(x), list(x.values()), weight), runs)


def training(table: Table, x: dict[str, Tensor]) -> None:
    chunked, recurrent, naive = ours("chunked"), ours("recurrent"), peer()
    for name, measure, runs in (("forward", forward, 3), ("forward + backward", both_ways, 1)):
        mine, oracle = measure(chunked, x, 5), measure(recurrent, x, runs)
        table.add_row(f"KDA {name}", "recurrent oracle", f"{mine:.1f}", f"{oracle:.1f}", f"{oracle / mine:.1f}")
        if isinstance(naive, str):
            table.add_row(f"KDA {name}", f"fla naive_chunk_kda ({naive})", f"{mine:.1f}", "", "")
            continue
        theirs = measure(naive, x, runs)
        table.add_row(f"KDA {name}", "fla naive_chunk_kda", f"{mine:.1f}", f"{theirs:.1f}", f"{theirs / mine:.1f}")
    if not isinstance(naive, str):
        with torch.no_grad():
            error = (naive(x) - chunked(x)).abs().max().item()
        table.caption = f"largest difference from the peer's output: {error:.1e}"


@torch.no_grad()
def decoding(table: Table, name: str, heads: int, width: int, near: int = 64, far: int = 65536) -> None:
    """One token at a time after `near` and after `far` tokens, in turns, so that a busy moment hits both."""
    layer = build(name, heads * width, heads=heads, head_dim=width, causal=True).eval()
    states = []
    for position in (near, far):
        state = layer.initial_state(1)
        for piece in torch.randn(1, position, heads * width).split(8192, 1):
            _, state = layer(piece, state=state)
        states.append(state)
    token, times = torch.randn(1, 1, heads * width), [float("inf")] * 2
    for _ in range(300):
        for i, state in enumerate(states):
            start = time.perf_counter()
            layer(token, state=state)
            times[i] = min(times[i], time.perf_counter() - start)
    early, late = (1e3 * t for t in times)
    table.add_row(
        f"{name} decode step, position {far}", f"position {near}", f"{late:.3f}", f"{early:.3f}", f"{early / late:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    title = (
        f"{given.length} tokens, {given.heads} heads × {given.width}, float32, {given.threads} threads; milliseconds"
    )
    table = Table(title=title)
    for column in ("what", "against", "ours", "theirs", "ratio"):
        table.add_column(column)
    training(table, inputs(given.length, given.heads, given.width))
    for name in ("kda", "linear"):
        decoding(table, name, given.heads, given.width)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
