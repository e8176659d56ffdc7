"""How much memory there is, how much a trial will want, and how much a call really took."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_KEEP_FREE = 0.9  # of what is available, this much may be planned for


def available(device: str) -> int:
    """Bytes that can be taken now: of the GPU, or of this machine and the container around this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free += [
            int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")
        ]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free.append(int(text) - int(used.read_text()))
    return min(free)


def estimate(network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> int:
    """Bytes that training on `batch` will take: what one example keeps for the backward pass, times the batch.

    Weights count four times (themselves, gradients, and AdamW's two moments), and what is kept counts half as much
    again for what lives only for a moment.
    """
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    examples = batch[0].shape[0]
    device = next(network.parameters()).device
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss(network(batch[0][:1].to(device)), batch[1][:1].to(device))
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    return 4 * weights + int(1.5 * examples * max(sum(kept.values()) - weights, 0))


def refusal(wanted: int, device: str, free: int | None = None) -> str:
    """Why something that wants `wanted` bytes is not tried; empty if it fits."""
    free = available(device) if free is None else free
    if wanted <= _KEEP_FREE * free:
        return ""
    return f"would need about {as_text(wanted)} of memory, and {as_text(free)} are free"


def as_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes that `call` took at its highest beyond what was there before; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives freed pages back, so that using them again is seen
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
    call()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
