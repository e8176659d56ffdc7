"""Mamba's and Titans' layers against other people's code with the same weights: forward and training, on this CPU.

    python benchmarks/memories.py        needs transformers and titans-pytorch (its `NeuralMemory`)

Times are of the process's CPU on one thread, the best of three, so that a busy machine counts less. Both sides get the
same input, and the largest difference of their outputs is printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.hub.official import find


def best(run: Callable[[], Any], repeats: int = 3) -> float:
    """CPU milliseconds of the fastest of some runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def row(name: str, theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        difference = (first(theirs(x)) - ours(x)).abs().max().item()
        forward = [best(lambda m=m: m(x)) for m in (theirs, ours)]
    training = [best(lambda m=m: first(m(x)).sum().backward()) for m in (theirs, ours)]
    cells = [f"{t:8.1f} {o:8.1f} ms {t / o:5.1f}×" for t, o in (forward, training)]
    print(f"{name:38} forward {cells[0]}   training {cells[1]}   off by {difference:.0e}", flush=True)


def titans(chunk: int, length: int) -> None:
    from titans_pytorch import NeuralMemory

    given = dict(
        dim=128, chunk_size=chunk, heads=4, dim_head=32, default_step_transform_max_lr=0.1,
        default_model_kwargs=dict(depth=2, expansion_factor=2.0),
    )  # fmt: skip
    theirs = NeuralMemory(**given)
    ours = find("lucidrains/titans-pytorch", "NeuralMemory").build(given, theirs.state_dict())
    row(f"Titans' memory, chunks of {chunk}, N = {length}", theirs, ours, torch.randn(1, length, 128))


def mamba(length: int, version: int) -> None:
    from transformers import Mamba2Config, MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    given = dict(hidden_size=256, num_hidden_layers=1)
    if version == 1:
        theirs = MambaMixer(MambaConfig(**given), 0)
    else:
        given |= dict(state_size=128, num_heads=8, head_dim=64, n_groups=1)
        theirs = Mamba2Mixer(Mamba2Config(**given), 0)
        with torch.no_grad():
            theirs.dt_bias.fill_(-3.0)
    ours = find("huggingface/transformers", type(theirs).__name__).build(given, theirs.state_dict())
    row(f"Mamba{'' if version == 1 else '-2'}, 256 channels, N = {length}", theirs, ours, torch.randn(1, length, 256))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("theirs, ours, theirs / ours")
    titans(64, 1024)
    titans(16, 1024)
    titans(4, 512)
    mamba(256, 1)
    mamba(1024, 2)
