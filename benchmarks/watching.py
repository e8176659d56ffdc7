"""What watching costs: statistics of a Llama-shaped layer at length, beside the same layer not watched.

    python benchmarks/watching.py [--tokens 8192 16384 32768] [--dim 512] [--heads 8] [--kv-heads 2] [--threads 2]

The layer is causal with grouped heads of 64; by default a quarter as wide as one of Llama 3.2 1B. For both passes, of
this run: seconds, and the memory that they took at their highest; the ratio is of processor time, which other work on
the machine disturbs less. "all weights" is what keeping every weight would take. Memory should grow with the tokens,
four times from 8,192 to 32,768.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import attnlab
from attnlab import lens
from attnlab.arena.memory import as_text, peak


def measured(call: Callable[[], object]) -> tuple[float, float, int]:
    """Seconds, seconds of the processor, and bytes of one call."""
    start, busy = time.perf_counter(), time.process_time()
    taken = peak(call, "cpu")
    return time.perf_counter() - start, time.process_time() - busy, taken or 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = attnlab.build(
        "llama", vocabulary=256, dim=given.dim, depth=1, heads=given.heads, kv_heads=given.kv_heads,
        hidden=4 * given.dim, length=max(given.tokens),
    ).eval()  # fmt: skip
    print(f"{'tokens':>8}{'plain':>19}{'watched':>19}{'ratio':>8}{'kept':>10}{'all weights':>13}   mean entropy")
    for n in given.tokens:
        ids = torch.randint(0, 256, (1, n))
        records: list[lens.Record] = []

        def plain(ids: Tensor = ids) -> None:
            model(ids, last=True)

        def watched(ids: Tensor = ids, records: list[lens.Record] = records) -> None:
            with lens.watch(model, keep="stats") as record:
                model(ids, last=True)
            records.append(record)

        with torch.no_grad():
            model(ids[:, :256])
            (before, cost, free), (after, more, taken) = measured(plain), measured(watched)
        (record,) = records
        every = 4 * given.heads * n * n
        print(
            f"{n:>8}{before:>8.2f} s{as_text(free):>9}{after:>8.2f} s{as_text(taken):>9}{more / cost:>7.2f}×"
            f"{as_text(record.bytes):>10}{as_text(every):>13}   {record[0].entropy.mean():.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
