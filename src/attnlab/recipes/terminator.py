"""Training of Terminator: the loss between slow kernels, the regulariser, and Kar3, an optimiser of signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.vision.terminator import Terminator
from attnlab.nn.spatial.hyperzzw import LocalBranch, RecursiveGate, SlowFast
from attnlab.nn.spatial.slow_net import SlowNet

Form = Literal["tiled", "channel_sum"]


def slow_loss(kernels: Sequence[Tensor], factors: Sequence[int], *, form: Form = "tiled") -> Tensor:
    """How far the slow kernels of a network's blocks are from each other: a local signal for each slow net.

        tiled:        Σ_{j<i} mean (tile(W_j) - W_i)²          W_j tiled along its channels to as many as W_i has
        channel_sum:  Σ_{j<i} mean (Σ_c W_j - Σ_c W_i)²        over the places

    `kernels` W (C_i, H, W), each with C_i = C_0 · factors[0] ⋯ factors[i-1]. Both forms are the authors'; the first is
    that of their configuration for CIFAR-10. Source: arXiv 2401.17948.
    """
    if form not in ("tiled", "channel_sum"):
        raise ValueError(f"form must be 'tiled' or 'channel_sum', got {form!r}")
    total = kernels[0].new_zeros(())
    for i, deep in enumerate(kernels):
        for j, shallow in enumerate(kernels[:i]):
            if form == "channel_sum":
                total = total + F.mse_loss(shallow.sum(-3), deep.sum(-3))
                continue
            times = math.prod(factors[j:i])
            if shallow.shape[-3] * times != deep.shape[-3]:
                got = f"{shallow.shape[-3]} × {times} and {deep.shape[-3]} channels"
                raise ValueError(f"factors must take kernel {j} to {i}, got {got}")
            total = total + F.mse_loss(shallow.repeat(*(1,) * (shallow.ndim - 3), times, 1, 1), deep)
    return total


def regulariser(net: nn.Module, *, slow_weight: float = 1e-6) -> Tensor:
    """Σ |p| over what connects slow and fast networks, and `slow_weight` · Σ |W| over the networks that write kernels.

    |·| is the L2 norm of a whole parameter. The first sum is over the weights and biases of each layer's convolutions
    outside its gates (RGU) and slow nets, and over its local branches' biases; the second over the weights of the gates
    and of the slow nets of maps, not of channels. The authors choose by name, to the same effect. Source: arXiv
    2401.17948.
    """
    fast: list[Tensor] = []
    slow: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, SlowFast):
            fast += [*module.mlp.parameters(), *module.bottleneck.parameters()]
            for branch in cast(Iterable[LocalBranch], module.branches):
                fast += [branch.bias, *branch.mixer.parameters()]
        elif isinstance(module, RecursiveGate) or (isinstance(module, SlowNet) and len(module.size) == 2):
            slow += [p for name, p in module.named_parameters() if name.endswith("weight")]
    if not fast:
        raise ValueError(f"net must hold SlowFast layers, {type(net).__name__} has none")
    return torch.stack([p.norm() for p in fast]).sum() + slow_weight * torch.stack([p.norm() for p in slow]).sum()


@register(
    Card(
        name="terminator_loss",
        title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
        paper="2401.17948",
        system="terminator",
        family="loss",
        kind=RECIPE,
    )
)
def terminator_loss(
    net: Terminator,
    logits: Tensor,
    targets: Tensor,
    *,
    smoothing: float = 0.09,
    weight: float = 5e-5,
    form: Form = "tiled",
) -> Tensor:
    """What Terminator is trained with: smoothed cross-entropy + slow loss + weight · regulariser.

    `logits (B, classes)`, `targets (B)`. The authors' weight is 5e-5 for CIFAR-10 and 4e-5 for CIFAR-100, with `Kar3`
    and `warm_cosine` for 100 epochs of batches of 64. Source: arXiv 2401.17948.
    """
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    return loss + slow_loss(net.slow_kernels(), net.factors, form=form) + weight * regulariser(net)


def warm_cosine(step: int, *, steps: int, warm: int) -> float:
    """The learning rate's factor at `step`: from 1e-8 linearly to 1 over `warm` steps, then half a cosine to 0."""
    if step < warm:
        return 1e-8 + (1 - 1e-8) * step / warm
    return 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(steps - warm, 1), 1.0)))


class Kar3(torch.optim.Optimizer):
    """Steps by signs alone: of the gradient and of two running means of those before it, 3·lr at most.

        p ← p - lr (sign g + sign a + sign b);  then a ← β₁ a + (1 - β₁) g,  b ← β₂ b + (1 - β₂) g        a, b from 0

    lr 1.215e-3 and betas (0.5, 0.95) for CIFAR-10, 1.20925e-3 and (0.75, 0.99) for CIFAR-100. Source: arXiv 2401.17948.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1.215e-3, *, betas: tuple[float, float] = (0.5, 0.95)
    ) -> None:
        if lr < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr must be at least 0 and betas lie in [0, 1), got {lr} and {betas}")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"means": (torch.zeros_like(p), torch.zeros_like(p))}
            signs = [g.sign() for g in grads]
            for which, beta in enumerate(group["betas"]):
                means = [self.state[p]["means"][which] for p in params]
                for sign, mean, grad in zip(signs, means, grads, strict=True):
                    sign.add_(mean.sign())
                    mean.lerp_(grad, 1 - beta)
            for p, sign in zip(params, signs, strict=True):
                p.sub_(sign, alpha=group["lr"])
        return loss
