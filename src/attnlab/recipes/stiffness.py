"""How stiff is a network, or an ODE, and where: the measures behind step sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain
from attnlab.models.skeletons.pyramid import Pyramid

Index = Literal["speed", "spectral", "ratio"]


def stiffness(g: Callable[[Tensor], Tensor], u: Tensor, index: Index = "speed") -> Tensor:
    """How stiff u' = g(u) is at the states u (T, n): (T,).

    "speed": |g(u)| / |u|. "spectral": the largest |Re λ| of the Jacobian of g. "ratio": the largest over the smallest.
    `g` takes one state (n,). Cost of the last two: O(T n³).
    """
    if u.ndim != 2:
        raise ValueError(f"u must be states (T, n), got {tuple(u.shape)}")
    if index == "speed":
        return torch.func.vmap(g)(u).norm(dim=1) / u.norm(dim=1).clamp(min=1e-12)
    if index not in ("spectral", "ratio"):
        raise ValueError(f"index must be 'speed', 'spectral' or 'ratio', got {index!r}")
    real = torch.linalg.eigvals(torch.func.vmap(torch.func.jacrev(g))(u)).real.abs()
    largest = real.amax(1)
    return largest if index == "spectral" else largest / real.amin(1).clamp(min=1e-12)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a network of this library, first to last."""
    if isinstance(model, Plain):
        return list(model.encoder.blocks)
    if isinstance(model, Pyramid):
        return [block for stage in model.stages for block in stage.blocks]  # type: ignore[union-attr]
    raise TypeError(f"blocks must be given for a network that is not of this library, {type(model).__name__}")


@register(
    Card(
        name="neural_stiffness",
        title="Understanding Self-attention Mechanism via Dynamical System Perspective",
        paper="2308.09939",
        family="measure",
        kind=RECIPE,
        cost="N",
    )
)
@torch.no_grad()
def neural_stiffness(
    model: nn.Module,
    x: Tensor,
    *,
    blocks: Sequence[nn.Module] | None = None,
    norm: Literal["l2", "l1"] = "l2",
    per_channel: bool = False,
) -> dict[int, Tensor]:
    """How far each residual block moves its input, relative to it, in one pass of `x`: by the block's place in order.

        NSI_t = mean over the batch of ‖x_{t+1} − x_t‖ / ‖x_t‖        norms over all of a sample

    Blocks that change the shape are left out. A good network is said to show a few sharp peaks over its depth, as
    the stiffness of an ODE does over time. A scalar each, or (C,) with `per_channel` (norms over the places of a map,
    or the tokens). After arXiv 2308.09939, whose exact formula was not at hand.

    Args:
        blocks: modules of any network, each run once and called with its input first; None for those of a network of
            this library.
    """
    if norm not in ("l2", "l1"):
        raise ValueError(f"norm must be 'l2' or 'l1', got {norm!r}")
    order, found = 2 if norm == "l2" else 1, {}

    def listen(at: int) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            before = given[0]
            if before.shape != out.shape:
                return
            channel = 1 if before.ndim > 3 else before.ndim - 1
            axes = [a for a in range(1, before.ndim) if not (per_channel and a == channel)]
            moved, size = (torch.linalg.vector_norm(t, order, dim=axes) for t in (out - before, before))
            found[at] = (moved / size.clamp(min=1e-12)).mean(0)

        return hook

    modules = blocks_of(model) if blocks is None else blocks
    hooks = [block.register_forward_hook(listen(at)) for at, block in enumerate(modules)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _profile(values: dict[int, Tensor] | Tensor) -> Tensor:
    profile = torch.stack(list(values.values())) if isinstance(values, dict) else values
    if profile.ndim != 1 or not len(profile):
        raise ValueError(f"values must be one number per block, got {tuple(profile.shape)}")
    return profile


def peakiness(values: dict[int, Tensor] | Tensor) -> tuple[float, float]:
    """The ratio of the highest to the mean of a profile over depth, and its variance."""
    profile = _profile(values)
    return (profile.max() / profile.mean()).item(), profile.var(unbiased=False).item()


def profile_distance(a: dict[int, Tensor] | Tensor, b: dict[int, Tensor] | Tensor, *, depths: int = 64) -> float:
    """From 0, alike, to 1: how differently two networks spread their stiffness over depth, whatever their number of
    blocks.

    ½ Σ |p − q|, each profile interpolated to `depths` places and summing to 1.
    """
    p, q = (F.interpolate(_profile(v)[None, None], depths, mode="linear", align_corners=True)[0, 0] for v in (a, b))
    return 0.5 * (p / p.sum() - q / q.sum()).abs().sum().item()


def stiffest(values: dict[int, Tensor], k: int) -> list[int]:
    """The k stiffest blocks, in order: where a few modules do nearly what modules everywhere do."""
    if not 0 < k <= len(values):
        raise ValueError(f"k must be from 1 to {len(values)}, the blocks measured, got {k}")
    return sorted(sorted(values, key=lambda at: -values[at].item())[:k])
