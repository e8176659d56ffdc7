"""attend against its peers, side by side in one run; each line prints a ratio. CPU, 2 threads, float32 by default.

    python benchmarks/attend.py [ROW …] [--threads 2]

Rows: neighborhood, window, long, routed, small, import. A ratio above 1 means that attnlab is faster by that factor;
the last column is the least that the project wants. Peers: torch's scaled_dot_product_attention, FlexAttention compiled
at its best block size, natten's own CPU path. All runs of a line are timed in turn (ours, peer, ours, peer, …), and it
compares the fastest of each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab import attend
from attnlab.patterns import Neighborhood, Pattern, Window
from attnlab.routing import TopKBlocks

Run = Callable[[], object]


def race(runs: dict[str, Run], rounds: int = 7) -> dict[str, float]:
    """The fastest time of each, in seconds, measured in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def line(case: str, ours: float, peer: str, theirs: float, wanted: float, unit: str = "ms") -> None:
    scale = {"ms": 1e3, "µs": 1e6}[unit]
    times = f"{ours * scale:9.2f} {unit}   {peer} {theirs * scale:9.2f} {unit}"
    print(f"{case:<58} {times:<62} {theirs / ours:7.2f}×   (≥ {wanted:g}×)", flush=True)


def inputs(heads: int, tokens: int, dim: int) -> list[Tensor]:
    return [torch.randn(1, heads, tokens, dim) for _ in range(3)]


def trained(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Run:
    """Forward and backward of `run`, with a fixed gradient of its output."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    weight = torch.randn_like(q)
    return lambda: torch.autograd.grad(run(*leaves), leaves, weight)


def compiled_flex(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> tuple[str, Run]:
    """FlexAttention, compiled, at the block size that runs fastest."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.cache_size_limit = 64
    flex = torch.compile(flex_attention, dynamic=False)
    found = {}

    def see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.allows(b, h, q, k)

    for block in (64, 128, 256):
        mask = create_block_mask(see, None, None, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=block)
        run = partial(flex, q, k, v, block_mask=mask)
        found[block] = (race({"": run}, 3)[""], run)
    block = min(found, key=lambda b: found[b][0])
    return f"compiled flex (block {block})", found[block][1]


def neighborhood() -> None:
    q, k, v = inputs(4, 56 * 56, 32)
    for dilation in (1, 4):
        pattern = Neighborhood((56, 56), 7, dilation)
        mask = pattern.matrix(56 * 56)
        runs: dict[str, Run] = {"ours": lambda p=pattern: attend(q, k, v, pattern=p)}
        case = f"neighborhood 56², kernel 7, dilation {dilation}"
        with torch.no_grad():
            try:
                from natten.functional import na2d

                heads_last = [x.transpose(1, 2).reshape(1, 56, 56, 4, 32) for x in (q, k, v)]
                options = {"kernel_size": 7, "dilation": dilation, "backend": "flex-fna"}
                runs["natten (CPU)"] = partial(na2d, *heads_last, **options)
            except ImportError:
                print("natten is not installed: left out")
            name, run = compiled_flex(pattern, q, k, v)
            times = race({**runs, name: run})
        for peer, wanted in (("natten (CPU)", 100), (name, 3)):
            if peer in times:
                line(f"{case}, inference", times["ours"], peer, times[peer], wanted)
        times = race(
            {
                "ours": trained(lambda q, k, v, p=pattern: attend(q, k, v, pattern=p), q, k, v),
                "dense": trained(lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, m), q, k, v),
            }
        )
        line(f"{case}, forward + backward", times["ours"], "masked SDPA", times["dense"], 8)


def window() -> None:
    tokens, pattern = 16384, Window(256)
    q, k, v = inputs(4, tokens, 64)
    with torch.no_grad():
        name, run = compiled_flex(pattern, q, k, v)
        times = race(
            {
                "ours": lambda: attend(q, k, v, pattern=pattern),
                "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                name: run,
            },
            5,
        )
    case = "causal window 256 of 16,384"
    line(f"{case}, inference", times["ours"], "causal SDPA", times["dense"], 13)
    line(f"{case}, inference", times["ours"], name, times[name], 0.75)
    ours = race({"ours": trained(lambda q, k, v: attend(q, k, v, pattern=pattern), q, k, v)}, 5)["ours"]
    half = inputs(4, tokens // 2, 64)
    dense = trained(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *half)
    line(f"{case}, forward + backward", ours, "causal SDPA (8,192, times 4)", 4 * race({"": dense}, 3)[""], 12)


_LONG = r"""
import re, time, torch
torch.set_num_threads({threads})
from attnlab import attend
from attnlab.patterns import Window
x = [torch.randn(1, 4, {tokens}, 64, requires_grad=True) for _ in range(3)]
weight, best = torch.randn(1, 4, {tokens}, 64), float("inf")
for _ in range(4):
    start = time.perf_counter()
    torch.autograd.grad(attend(*x, pattern=Window(256)), x, weight)
    best = min(best, time.perf_counter() - start)
# Not getrusage: what it calls the peak includes the size of the process that started this one.
print(best, int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 2**20)
"""


def long() -> None:
    found = []
    for tokens in (16384, 65536):
        code = _LONG.format(threads=torch.get_num_threads(), tokens=tokens)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append([float(x) for x in done.stdout.split()])
    (short, _), (four_times, peak) = found
    print(
        f"{'causal window 256 of 65,536, forward + backward':<58} {four_times * 1e3:9.2f} ms   "
        f"{four_times / short:.2f}× the time of 16,384 (≤ 4.6×), peak of the whole process {peak:.2f} GiB (< 3)",
        flush=True,
    )


def routed() -> None:
    """The best 8 blocks of 64 tokens each, and the best 8 of 64 blocks in all (of 256 tokens)."""
    q, k, v = inputs(4, 16384, 64)
    half = inputs(4, 8192, 64)
    routes = {"8 blocks of 64 tokens": 64, "8 of 64 blocks": 256}
    runs = {name: partial(attend, route=TopKBlocks(8, block=block, causal=True)) for name, block in routes.items()}
    with torch.no_grad():
        dense = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        times = race({"dense": dense, **{name: partial(run, q, k, v) for name, run in runs.items()}}, 4)
    for name in routes:
        line(f"routed, {name}, causal, inference", times[name], "causal SDPA", times["dense"], 5)
    dense = trained(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *half)
    times = race({"dense": dense, **{name: trained(run, q, k, v) for name, run in runs.items()}}, 2)
    for name in routes:
        case = f"routed, {name}, causal, forward + backward"
        line(case, times[name], "causal SDPA (8,192, times 4)", 4 * times["dense"], 4)


def small() -> None:
    q, k, v = inputs(4, 64, 32)
    times = race(
        {
            "ours": lambda: [attend(q, k, v) for _ in range(100)],
            "torch": lambda: [F.scaled_dot_product_attention(q, k, v) for _ in range(100)],
        },
        50,
    )
    line("attend on (1, 4, 64, 32)", times["ours"] / 100, "SDPA", times["torch"] / 100, 1 / 1.4, "µs")


def imports() -> None:
    def seconds(module: str) -> float:
        code = f"import time; s = time.perf_counter(); {module}; print(time.perf_counter() - s)"
        run = [sys.executable, "-c", code]
        return min(float(subprocess.run(run, capture_output=True, check=True).stdout) for _ in range(3))

    ours, torchs = seconds("import attnlab; attnlab.attend"), seconds("import torch")
    gap = f"torch {torchs:.2f} s: + {ours - torchs:.2f} s (≤ 0.3)"
    print(f"{'import attnlab, with attend at hand':<58} {ours:9.2f} s    {gap}", flush=True)


ROWS = {
    "neighborhood": neighborhood, "window": window, "long": long, "routed": routed, "small": small, "import": imports,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}; all if none is named")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    unknown = [r for r in given.rows if r not in ROWS]
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
    print(f"torch {torch.__version__}, {given.threads} threads, float32")
    for row in given.rows or ROWS:
        ROWS[row]()


if __name__ == "__main__":
    main()
