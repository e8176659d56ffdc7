"""What each head adds to the residual stream: its output through its own part of the output projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.lens.circuits.traces import Inputs, run
from attnlab.lens.event import Event
from attnlab.lens.subscriber import Handle, Subscriber
from attnlab.lens.tap import join


def head_contributions(
    model: nn.Module, inputs: Inputs, *, pool: Literal["mean", "last"] = "mean", mask: Tensor | None = None
) -> Tensor:
    """`(B, layers · heads, C)`: z_h W_O^h, averaged over the tokens (or of the last), heads in the order L0H0, L0H1, …

    The biases of the projections belong to no head and are left out. `mask (B, N)`, true at tokens that are no padding,
    which otherwise all count; "last" is then the last of these.

    The projection is the first module within each attention module that is called on its heads' joined outputs,
    whatever it is named; ValueError where there is none.
    """
    if pool not in ("mean", "last"):
        raise ValueError(f"pool must be 'mean' or 'last', got {pool!r}")
    seen = _Projections(pool, mask)
    leave = join(model, seen)
    try:
        run(model, inputs)
    finally:
        leave()
    parts = []
    with torch.no_grad():
        for event, pooled in seen.heads:
            projection = seen.found.get(event.name) or getattr(event.module, "out_proj", None)
            if projection is None:
                raise ValueError(
                    f"{event.name} has no output projection of its own: no module within it is called on the heads' "
                    f"joined outputs, {event.heads} × {pooled.shape[-1]} wide"
                )
            batch, heads, width = pooled.shape
            alone = pooled.new_zeros(batch, heads, heads, width)
            every = torch.arange(heads, device=pooled.device)
            alone[:, every, every] = pooled
            parts.append(projection(alone.flatten(2)) - projection(pooled.new_zeros(1, 1, heads * width)))
    return torch.cat(parts, 1)


class _Projections(Subscriber):
    """The heads' outputs of each layer, and the module that took them."""

    def __init__(self, pool: str, mask: Tensor | None) -> None:
        self.pool, self.mask = pool, mask
        self.heads: list[tuple[Event, Tensor]] = []
        self.found: dict[str, nn.Module] = {}

    def open(self, model: nn.Module) -> Iterable[Handle]:
        return [
            module.register_forward_pre_hook(self._called(name))
            for name, module in model.named_modules()
            if name and not any(module.children())
        ]

    def _called(self, name: str) -> Any:
        def called(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not self.heads or not arguments or not isinstance(arguments[0], Tensor):
                return
            event, pooled = self.heads[-1]
            inside = not event.name or name.startswith(event.name + ".")
            fits = arguments[0].shape[-1] == event.heads * pooled.shape[-1] and hasattr(module, "weight")
            if inside and fits and event.name not in self.found:
                self.found[event.name] = module

        return called

    def after(self, event: Event, out: Tensor) -> None:
        out = out.detach()
        if self.mask is None:
            pooled = out.mean(2) if self.pool == "mean" else out[:, :, -1]
        else:
            kept = self.mask.to(out)[:, None, :, None]
            if self.pool == "mean":
                pooled = (out * kept).sum(2) / kept.sum(2)
            else:
                last = (self.mask * torch.arange(out.shape[2], device=out.device)).argmax(1)
                pooled = out[torch.arange(len(out)), :, last]
        self.heads.append((event, pooled))
