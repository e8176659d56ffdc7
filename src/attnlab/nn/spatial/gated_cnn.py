"""The gated CNN mixer (MambaOut): what is left of Mamba without its state space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.by_rows import by_rows
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.fused import product
from attnlab.nn.untouched import untouched

# As many times more places than channels, from which on products with slices of the weights cost less than copies.
_TRAINED, _EVALUATED = 4, 16
_GELU = nn.GELU()


@register(
    Card(
        name="gated_cnn",
        title="MambaOut: Do We Really Need Mamba for Vision?",
        paper="2405.07992",
        system="mambaout",
        family="spatial",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
    )
)
class GatedCNN(nn.Module):
    """Mixes places by a depthwise convolution of some channels, inside a gated MLP: Mamba's block without its SSM.

        g, i, c = W1 x                                    hidden, hidden - c and c channels, the last c convolved
        y = W2 (gelu(g) ⊙ [i, dwconv_k(c)])

    `(B, C, H, W)` to the same, any size. `hidden` is ⌊expansion·C⌋, c is ⌊conv_ratio·C⌋; with `conv_ratio=0` it is a
    gated MLP and places do not mix. Cost: O(N·C·(3·hidden + conv_ratio·k²)). Source: arXiv 2405.07992.
    """

    def __init__(self, dim: int, *, kernel: int = 7, expansion: float = 8 / 3, conv_ratio: float = 1.0) -> None:
        super().__init__()
        hidden, convolved = int(expansion * dim), int(conv_ratio * dim)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, to keep the map's size, got {kernel}")
        if hidden < 1:
            raise ValueError(f"expansion must leave at least one hidden channel of dim = {dim}, got {expansion}")
        if not 0 <= convolved <= hidden:
            raise ValueError(f"conv_ratio must lie between 0 and expansion = {expansion:.3g}, got {conv_ratio}")
        self.dim, self.hidden, self.convolved = dim, hidden, convolved
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.conv = DepthwiseConv(convolved, kernel) if convolved else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        x, rows = x.movedim(1, -1), x.numel() // self.dim
        many = self.dim * (_TRAINED if torch.is_grad_enabled() else _EVALUATED)
        if rows >= many and isinstance(self.conv, DepthwiseConv) and _plain(x, self.fc1, self.fc2):
            c = product(x, self.fc1.weight[-self.convolved :], self.fc1.bias[-self.convolved :])
            mixed = self.conv(c.movedim(-1, 1)).movedim(1, -1)
            return by_rows(self.apart, x, mixed, through=(self.fc1, self.fc2)).movedim(-1, 1)
        gate, value = self.fc1(x).split(self.hidden, -1)
        if self.conv is not None:
            still, c = value.split((self.hidden - self.convolved, self.convolved), -1)
            mixed = self.conv(c.movedim(-1, 1)).movedim(1, -1)
            if torch.is_grad_enabled():
                value = torch.cat((still, mixed), -1)
            else:  # what is not convolved stays where it is
                c.copy_(mixed)
        return self.fc2(F.gelu(gate) * value if torch.is_grad_enabled() else F.gelu(gate).mul_(value)).movedim(-1, 1)

    def apart(self, x: Tensor, mixed: Tensor) -> Tensor:
        """y without a concatenation: what is convolved and what is not meet in sums over slices of the weights."""
        widths = (self.hidden - self.convolved, self.convolved)
        (g, h, i, _), (a, b, c, _) = self.fc1.weight.split(2 * widths), self.fc1.bias.split(2 * widths)
        first, second = self.fc2.weight.split(widths, 1)
        y = product(product(x, g, a, _GELU) * product(x, i, c), first, self.fc2.bias)
        return y + product(product(x, h, b, _GELU) * mixed, second, None)


def _plain(x: Tensor, *layers: nn.Module) -> bool:
    return all(type(layer) is nn.Linear for layer in layers) and untouched(x, *layers)
