"""A convolution with its batch norm, and what a trained network of them needs no longer: `fold_norms`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvNorm(nn.Sequential):
    """A convolution, a batch norm, and an activation if given; odd kernels keep the size at stride 1.

    The norm makes the convolution's own bias superfluous; some authors have one all the same.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: nn.Module | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_dim)
        if activation is not None:
            self.act = activation


class ResidualConv(ConvNorm):
    """x + norm(dwconv(x)), `(B, C, H, W)` to the same, for `fold_norms` to make a single convolution of."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__(dim, dim, kernel, groups=dim)
        self.summed = False  # whether the kernel adds x itself

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y if self.summed else x + y


@torch.no_grad()
def fold_norms(module: nn.Module) -> None:
    """Fold each batch norm of a `ConvNorm` in `module` into its convolution, and the sum of a `ResidualConv` too.

    In place, exact to rounding in evaluation; what is folded cannot be trained any more as it was.
    """
    if module.training:
        raise ValueError("fold_norms needs eval(): batch norms in training depend on the batch")
    for part in list(module.modules()):
        if not isinstance(part, ConvNorm) or not isinstance(part.norm, nn.BatchNorm2d):
            continue
        part.conv = fuse_conv_bn_eval(part.conv, part.norm)
        part.norm = nn.Identity()  # type: ignore[assignment]
        if isinstance(part, ResidualConv):
            part.conv.weight += F.pad(part.conv.weight.new_ones(1, 1), (part.conv.kernel_size[0] // 2,) * 4)
            part.summed = True
