"""SpaRTAN's channel mixer: channels as waves, turned and added to that of the strongest channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, FEATURES, Card, register
from attnlab.nn.channel.squeeze_excite import SqueezeExcite
from attnlab.nn.spatial.smixer import ConvNormGELU


@register(
    Card(
        name="wave",
        title="SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition",
        paper="2507.10999",
        family="channel",
        kind=FEATURES,
        capabilities=ANY_GRID,
        cost="N",
        growth=1.0,
        sample={"ratio": 2},
    )
)
class WaveMixer(nn.Module):
    """Mixes channels by complex weights, a number per pair of them, instead of a wide MLP.

        t = gelu(Wt x),  w = Wp x                            ratio·C = E channels
        f = w t + w_m t_m                                    m = argmax of x's channels, for each place
        h = z f,  channels (2i, 2i + 1) of f being the complex number i; z (E/2)
        y = Wo se(gelu(bn(conv3×3(h))))

    `(B, C, H, W)` to the same, any size. The convolution is depthwise, or of C groups with `depthwise=False`, as the
    later stages have it. The waves are turned in float32 at least. Cost: O(N(6EC + 18E·E/groups)). Source: arXiv
    2507.10999.
    """

    def __init__(self, dim: int, *, ratio: int = 4, depthwise: bool = True) -> None:
        super().__init__()
        hidden = dim * ratio
        if dim < 4:
            raise ValueError(f"dim must be at least 4, got {dim}")
        if ratio < 1 or hidden % 2:
            raise ValueError(f"ratio must be at least 1 and give an even number of channels, got {ratio} × {dim}")
        self.dim, self.hidden = dim, hidden
        self.wtp = nn.Linear(dim, 2 * hidden)  # rows: t | w
        self.turn = nn.Parameter(torch.randn(hidden // 2, 2))
        self.conv = ConvNormGELU(hidden, hidden, groups=hidden if depthwise else dim)
        self.se = SqueezeExcite(hidden, dim // 4, activation=nn.ReLU)
        self.wo = nn.Linear(hidden, dim)

    def waves(self, x: Tensor) -> Tensor:
        """f of tokens `(…, C)`, before it is turned: `(…, E)`."""
        t, w = self.wtp(x).chunk(2, -1)
        t = F.gelu(t)
        strongest = x.argmax(-1, keepdim=True)
        return torch.addcmul(w.gather(-1, strongest) * t.gather(-1, strongest), w, t)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (B, {self.dim}, H, W) and not empty, got {tuple(x.shape)}")
        f = self.waves(x.permute(0, 2, 3, 1))
        wide = torch.promote_types(f.dtype, torch.float32)
        pairs = torch.view_as_complex(f.to(wide).unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.view_as_complex(self.turn.to(wide))).flatten(-2)
        y = self.se(self.conv(turned.to(f.dtype).permute(0, 3, 1, 2)))
        return self.wo(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
