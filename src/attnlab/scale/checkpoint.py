"""Where training stood, written by all ranks together, and the last place that was written whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_DONE = "complete"


def save(
    folder: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int = 2, **more: Any
) -> Path:
    """Write model and optimizer after `step` steps into `folder/step-…`; all ranks call it. Keeps the last few.

    Sharded parameters (FSDP2) are written by whoever holds them. What is half written when a rank dies is never read:
    a folder counts only once it is marked. `more` are further entries, numbers and tensors, the same on all ranks.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    folder = Path(folder) / f"step-{step:08d}"
    if _first():
        shutil.rmtree(folder, ignore_errors=True)
    _barrier()
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments, "more": {"step": step, **more}}, checkpoint_id=folder)
    _barrier()
    if _first():
        (folder / _DONE).touch()
        for old in _complete(folder.parent)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier()
    return folder


def resume(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> Mapping[str, Any]:
    """Read the last whole checkpoint into model and optimizer; `{"step": 0, **more}` if there is none.

    Another number of ranks than wrote it will do. `more` names the further entries, with what they are at the start.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    found = _complete(Path(folder))
    rest: dict[str, Any] = {"step": 0, **more}
    if not found:
        return rest
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "more": rest}
    checkpoint.load(state, checkpoint_id=found[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return dict(state["more"])


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step-*/{_DONE}"))


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
