"""An MLP that looks at its neighbours, between its two layers (PVTv2, VAN, BiFormer)."""

from __future__ import annotations

from torch import Tensor, nn

from attnlab.models.skeletons.parts import MLP
from attnlab.nn.fused import linear


class LocalMLP(MLP):
    """An MLP with a 3×3 depth-wise convolution before its activation, on `(B, H, W, C)`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(linear(x, self.fc1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return linear(self.act(x), self.fc2)
