"""How pointer networks learn: from examples that are solved as they are needed, so that none comes twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attnlab.models.pointing.answering import Answering
from attnlab.recipes.minilm import Rate


def in_order(points: Tensor) -> Tensor:
    """Each set's points from left to right: the order in which answers are learned soonest (arXiv 1511.06391)."""
    order = points[..., :1].argsort(dim=1)
    return points.gather(1, order.expand_as(points))


def teach(
    network: Answering,
    solve: Callable[[Tensor], Tensor],
    draw: Callable[[int, int], Tensor],
    *,
    sizes: Sequence[int],
    steps: int,
    batch: int = 128,
    rate: float | Rate = 1.0,
    clip: float = 2.0,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> list[float]:
    """Trains `network` in place on `solve(points)` for `points = draw(batch, n)`, n of each of `sizes` in turn.

    Returns the loss at each step. Defaults: those of arXiv 1506.03134, SGD of rate 1 on 128 sets with gradients
    clipped at norm 2. `optimizer` is called with the parameters and `lr`; `rate` may depend on the step.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must hold numbers of points, got {tuple(sizes)}")
    rates = rate if callable(rate) else lambda step: rate
    updates = optimizer(network.parameters(), lr=rates(0))
    network.train()
    history = []
    for step in range(steps):
        points = draw(batch, sizes[step % len(sizes)])
        loss = network.loss(points, solve(points))
        updates.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        for group in updates.param_groups:
            group["lr"] = rates(step)
        updates.step()
        history.append(loss.item())
    network.eval()
    return history
