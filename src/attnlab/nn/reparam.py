"""Large depth-wise convolutions trained with dilated branches beside them, and merged into one for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.nn.depthwise import DepthwiseConv

# Kernel and dilation of the branches beside a kernel of each size, as UniRepLKNet has them (arXiv 2311.15599).
BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class Branch(nn.Module):
    """A depth-wise convolution and its batch norm."""

    def __init__(self, dim: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = DepthwiseConv(dim, kernel, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def merged(self, size: int) -> tuple[Tensor, Tensor]:
        """The `size`×`size` kernels and the biases that it amounts to in evaluation."""
        factor, shift = _affine(self.norm)
        weight, dilation = self.conv.weight * factor[:, None, None, None], self.conv.dilation[0]
        if dilation > 1:  # zeros between the taps
            taps, side = weight.shape[-1], (weight.shape[-1] - 1) * dilation + 1
            spread = F.pad(weight[..., None, :, None], (0, dilation - 1, 0, 0, 0, dilation - 1))
            weight = spread.reshape(-1, 1, taps * dilation, taps * dilation)[..., :side, :side]
        return F.pad(weight, ((size - weight.shape[-1]) // 2,) * 4), shift


class DilatedReparam(nn.Module):
    """A large depth-wise convolution, trained as a sum with smaller and sparser ones, all of which it can absorb.

        y = last(bn(dwconv_k(x)) + Σᵢ bnᵢ(dwconv_{kᵢ, dilation rᵢ}(x)))        `BRANCHES` has the kᵢ and rᵢ

    `(B, C, H, W)` to the same. `last`, a further batch norm, is there with `norm=True`. In evaluation it is one
    convolution, whose kernel is merged at each call; `fuse()` merges it for good. Cost then: N·C·k².
    Sources: arXiv 2311.15599 (UniRepLKNet), 2502.20087 (LMMMEng/OverLoCK).
    """

    def __init__(self, dim: int, kernel: int = 7, *, norm: bool = False) -> None:
        super().__init__()
        if kernel not in BRANCHES:
            raise ValueError(f"kernel must be one of {', '.join(map(str, BRANCHES))}, got {kernel}")
        self.large: Branch | DepthwiseConv = Branch(dim, kernel)
        self.branches = nn.ModuleDict({f"k{k}_{r}": Branch(dim, k, r) for k, r in BRANCHES[kernel]})
        self.last = nn.BatchNorm2d(dim) if norm else None
        self.kernel = kernel

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight `(C, 1, k, k)` and bias `(C)` of the one convolution that it is in evaluation."""
        if isinstance(self.large, DepthwiseConv):
            return self.large.weight, self.large.bias  # type: ignore[return-value]
        parts = [part.merged(self.kernel) for part in (self.large, *self.branches.values())]  # type: ignore[operator]
        weight, bias = torch.stack([w for w, _ in parts]).sum(0), torch.stack([b for _, b in parts]).sum(0)
        if self.last is not None:
            factor, shift = _affine(self.last)
            weight, bias = weight * factor[:, None, None, None], bias * factor + shift
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            weight, bias = self.merged()
            return F.conv2d(x, weight, bias, padding=self.kernel // 2, groups=len(weight))
        y = self.large(x)
        for branch in self.branches.values():
            y = y + branch(x)
        return y if self.last is None else self.last(y)

    @torch.no_grad()
    def fuse(self) -> None:
        """Become the one convolution, for good; in evaluation, and for it alone."""
        if self.training:
            raise ValueError("fuse needs eval(): batch norms in training depend on the batch")
        weight, bias = self.merged()
        conv = DepthwiseConv(len(weight), self.kernel).to(weight)
        conv.weight, conv.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.large, self.branches, self.last = conv.eval(), nn.ModuleDict(), None


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The factor and the summand per channel that a batch norm is in evaluation."""
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError("norm must be a batch norm with running statistics")
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return factor, norm.bias - norm.running_mean * factor
