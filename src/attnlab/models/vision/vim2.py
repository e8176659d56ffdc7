"""ViM2: a pyramid whose tokens and channels are both mixed by selective state spaces (MambaMixer)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from attnlab.cards import BACKBONE, Card, Size, register
from attnlab.models.skeletons.averaging import AveragedStack, Transposed
from attnlab.models.skeletons.parts import MLP, ChannelNorm, DropPath, drop_path_rates, trunc_normal_linear
from attnlab.models.skeletons.pyramid import Place, Pyramid
from attnlab.nn.linear.scans import BidirectionalMamba, CrossScan


def _size(params: int, dim: int, depths: tuple[int, ...]) -> Size:
    return Size(params, {"dims": tuple(dim * 2**i for i in range(4)), "depths": depths})


# Parameters at 224² with 1,000 classes, measured here: there is no code of the authors to measure. The paper gives
# 20, 43 and 74 million, and not what it takes to arrive at them. Blocks whose size grows with the square of the width
# cannot: small has 6 layers of 384 channels more than tiny, of 3.8 million each then, and the last layer of tiny, of
# 768 channels, would alone have 15.
SIZES = {
    "vim2_tiny": _size(20_211_826, 96, (1, 1, 3, 1)),
    "vim2_small": _size(34_818_580, 96, (1, 1, 9, 1)),
    "vim2_base": _size(58_929_652, 128, (1, 1, 9, 1)),
}


class TokenMixing(nn.Module):
    """`repeats` times x = x + drop_path(cross_scan(norm x)): tokens `(B, N, C)` of a grid to the same."""

    def __init__(self, dim: int, *, repeats: int, states: int, expand: int, drop_path: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(repeats))
        self.mixers = nn.ModuleList(CrossScan(dim, states=states, expand=expand) for _ in range(repeats))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *, grid: tuple[int, ...]) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + self.drop_path(mixer(norm(x), grid=grid))
        return x


class ChannelMixing(nn.Module):
    """x = x + drop_path(mixer(norm(x)ᵀ)ᵀ), the mixer scanning the channels both ways: N = `tokens` is fixed."""

    def __init__(self, dim: int, tokens: int, *, inner: int, states: int, drop_path: float) -> None:
        super().__init__()
        self.norm, self.tokens, self.drop_path = nn.LayerNorm(dim), tokens, DropPath(drop_path)
        rank = max(1, inner // 32)
        self.mixer = Transposed(BidirectionalMamba(tokens, states=states, inner=inner, rank=rank))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.tokens:
            raise ValueError(f"x must have {self.tokens} tokens, for which the mixer was made, got {x.shape[1]}")
        return x + self.drop_path(self.mixer(self.norm(x)))


class MLPMixing(nn.Module):
    """x = x + drop_path(mlp(norm x)): what the selective channel mixer takes the place of."""

    def __init__(self, dim: int, *, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop_path = nn.LayerNorm(dim), MLP(dim, 4 * dim), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


class OnMap(nn.Module):
    """An `AveragedStack` over the places of a map: `(B, C, H, W)` to the same."""

    def __init__(self, stack: AveragedStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        x = self.stack(x.permute(0, 2, 3, 1).flatten(1, 2), grid=grid)
        return x.unflatten(1, grid).permute(0, 3, 1, 2)


@register(
    Card(
        name="vim2",
        title="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
        paper="2403.19888",
        family="linear",
        kind=BACKBONE,
        cost="N",
        sample={
            "dims": (8, 8, 12, 16), "depths": (1, 1, 2, 1), "repeats": 1, "states": 2, "image": 64, "num_classes": 10,
        },
        sizes=SIZES,
    )
)  # fmt: skip
class ViM2(Pyramid):
    """An image backbone without attention: each layer scans its places in four directions, then its channels in two.

        patches 4×4 → 4 stages, the map halved between them → norm → mean → head
        layer l of a stage:   y_T = `repeats` × (x + cross_scan(norm x)),   y_C = x + channel_scan(norm(x)ᵀ)ᵀ
        what each of them reads: learned sums of all y_T and y_C of the stage so far (`AveragedStack`)

    Images `(B, in_channels, image, image)` to logits `(B, num_classes)`. The channel mixers' width is the number of
    tokens, so one network has one image size; with `channels="mlp"` (the paper's ViM2-MLP) any size will do. The paper
    says neither where norms and residual paths are nor how wide the channel mixers are: here they are as in VMamba,
    and at most `channel_inner` wide, with which the smallest network has the 20 million parameters that are stated.
    Cost O(N C (C + S)). Source: arXiv 2403.19888, version 1.

    Args:
        depths: layers of each stage; repeats: token mixers for each channel mixer.
        averaging: of `AveragedStack`, "paper" or "softmax".
        image: the image's sides, or (height, width), each a multiple of 32.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        repeats: int = 2,
        states: int = 16,
        expand: int = 2,
        channels: str = "selective",
        channel_inner: int = 64,
        averaging: str = "paper",
        image: int | tuple[int, int] = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        if channels not in ("selective", "mlp"):
            raise ValueError(f"channels must be 'selective' or 'mlp', got {channels!r}")
        size = (image, image) if isinstance(image, int) else tuple(image)
        last = 4 * 2 ** (len(dims) - 1)
        if size[0] % last or size[1] % last:
            raise ValueError(f"image must be a multiple of {last} on each side, got {size}")
        rates = iter(drop_path_rates(drop_path, sum(depths)))

        def block(place: Place) -> nn.Module:
            side = 4 * 2**place.stage
            tokens = (size[0] // side) * (size[1] // side)
            first: list[nn.Module] = []
            second: list[nn.Module] = []
            for _ in range(depths[place.stage]):
                rate = next(rates)
                first.append(TokenMixing(place.dim, repeats=repeats, states=states, expand=expand, drop_path=rate))
                inner = min(expand * tokens, channel_inner)
                second.append(
                    MLPMixing(place.dim, drop_path=rate)
                    if channels == "mlp"
                    else ChannelMixing(place.dim, tokens, inner=inner, states=states, drop_path=rate)
                )
            return OnMap(AveragedStack(first, second, kind=averaging))

        super().__init__(
            dims=dims,
            depths=(1,) * len(dims),
            strides=(4, *(2,) * (len(dims) - 1)),
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
        )
        self.image = size if channels == "selective" else None
        self.head.apply(trunc_normal_linear)

    def embed(self, x: Tensor) -> Tensor:
        if self.image is not None and x.ndim == 4 and tuple(x.shape[2:]) != self.image:
            raise ValueError(f"x must be images of {self.image}, for which the network was made, got {tuple(x.shape)}")
        return super().embed(x)
