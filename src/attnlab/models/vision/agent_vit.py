"""Agent attention in three known networks: Agent-DeiT (plain), Agent-Swin and Agent-PVT (pyramids)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import ANY_GRID, BACKBONE, Card, Size, register
from attnlab.models.skeletons.parts import ChannelNorm, Downsample
from attnlab.models.skeletons.plain import Plain, Positions
from attnlab.models.skeletons.pyramid import Block, Place, Pyramid
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.shifted_window import ShiftedWindow
from attnlab.nn.tokens.agent import AgentAttention

_TITLE = "Agent Attention: On the Integration of Softmax and Linear Attention"
_FINE = partial(nn.LayerNorm, eps=1e-6)

# Parameters at 224² with 1,000 classes, counted on the authors' code.
DEIT_SIZES = {
    "agent_deit_tiny": Size(6_015_640, {"dim": 192, "heads": 3}),
    "agent_deit_small": Size(22_647_112, {"dim": 384, "heads": 6}),
    "agent_deit_base": Size(87_204_904, {"dim": 768, "heads": 12, "agents": 81, "agent_depth": 4}),
}
SWIN_SIZES = {
    "agent_swin_tiny": Size(28_902_964, {"dim": 96, "depths": (2, 2, 6, 2), "agent_depths": (2, 2, 6, 0)}),
    "agent_swin_small": Size(49_666_684, {"dim": 96, "depths": (2, 2, 18, 2), "agent_depths": (2, 2, 0, 0)}),
    "agent_swin_base": Size(88_095_096, {"dim": 128, "depths": (2, 2, 18, 2), "agent_depths": (2, 2, 2, 0)}),
}
PVT_SIZES = {
    "agent_pvt_tiny": Size(11_570_352, {"depths": (2, 2, 2, 2)}),
    "agent_pvt_small": Size(20_635_066, {"depths": (3, 4, 6, 3)}),
    "agent_pvt_medium": Size(35_921_746, {"depths": (3, 4, 18, 3)}),
    "agent_pvt_large": Size(48_738_180, {"depths": (3, 8, 27, 3)}),
}


@register(
    Card(
        name="agent_deit",
        title=_TITLE,
        paper="2312.08874",
        system="agent_attention",
        family="tokens",
        kind=BACKBONE,
        cost="n N",
        sample={"dim": 16, "depth": 2, "heads": 2, "agents": 4, "image": 32, "patch": 8, "num_classes": 10},
        sizes=DEIT_SIZES,
    )
)
class AgentDeiT(Plain):
    """DeiT with agents in its first `agent_depth` layers (all by default): linear in the number of patches.

    Images (B, in_channels, H, W) → logits (B, num_classes). Source: arXiv 2312.08874 (agent_deit.py). The rest of the
    arguments are `Plain`'s.
    """

    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        agents: int | Sequence[int] = 49,
        agent_depth: int | None = None,
        qkv_bias: bool = True,
        image: int = 224,
        patch: int = 16,
        **plain: Any,
    ) -> None:
        deep = depth if agent_depth is None else agent_depth
        counts = _per("layer", "agents", agents, deep)
        grid = (image // patch, image // patch)

        def mixer(layer: int) -> nn.Module:
            if layer >= deep:
                return MultiHead(dim, heads=heads, bias=qkv_bias, out_bias=True)
            return AgentAttention(dim, heads=heads, agents=counts[layer], grid=grid, class_token=True, bias=qkv_bias)

        options = {"norm": _FINE, **plain}
        super().__init__(dim=dim, depth=depth, mixer=mixer, image=image, patch=patch, **options)


class PatchMerging(nn.Module):
    """Halves a map: each 2×2 places side by side, normed, projected: (B, C, H, W) → (B, out, ⌈H/2⌉, ⌈W/2⌉).

    An odd side gets a row of zeros, as Swin's detectors do.
    """

    def __init__(self, dim: int, out_dim: int, stride: int = 2) -> None:
        super().__init__()
        if stride != 2:
            raise ValueError(f"stride must be 2, got {stride}")
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)  # columns outermost
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


@register(
    Card(
        name="agent_swin",
        title=_TITLE,
        paper="2312.08874",
        system="agent_attention",
        family="tokens",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="n N",
        growth=1.0,
        sample={
            "dim": 16, "depths": (1, 1), "heads": (2, 2), "agents": (4, 4), "agent_depths": (1, 0), "image": 32,
            "num_classes": 10,
        },
        sizes=SWIN_SIZES,
    )
)  # fmt: skip
class AgentSwin(Pyramid):
    """Swin whose early blocks look at the whole map through agents instead of into windows.

    Images (B, in_channels, H, W), any size, → logits (B, num_classes). Source: arXiv 2312.08874 (agent_swin.py, whose
    agent windows are as wide as the map).

    Args:
        agent_depths: how many blocks, from the first, of each stage use agents; the others are (shifted) windows.
        agents: their number in each stage. image: the size whose position biases are learned.
    """

    def __init__(
        self,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] | None = None,
        agents: Sequence[int] = (9, 16, 49, 49),
        agent_depths: Sequence[int] = (2, 2, 6, 0),
        window: int = 7,
        patch: int = 4,
        image: int = 224,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        dims = [dim * 2**stage for stage in range(len(depths))]
        counts = [width // 32 for width in dims] if heads is None else heads
        if not len(depths) == len(counts) == len(agents) == len(agent_depths):
            raise ValueError("depths, heads, agents and agent_depths need one entry per stage")

        def block(place: Place) -> nn.Module:
            side, head = image // (patch * 2**place.stage), counts[place.stage]
            mixer: nn.Module
            if place.index < agent_depths[place.stage]:
                mixer = AgentAttention(
                    place.dim, heads=head, agents=agents[place.stage], grid=(side, side), bias=qkv_bias
                )
            else:
                size = min(window, side)
                shift = size // 2 if place.index % 2 and side > window else 0
                mixer = ShiftedWindow(place.dim, heads=head, window=size, shift=shift, bias=qkv_bias)
            return Block(place.dim, mixer, layout="tokens", mlp=mlp_ratio, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(patch, *(2,) * (len(depths) - 1)),
            stem=Downsample(in_channels, dim, patch),
            downsample=PatchMerging,
            block=block,
            norm=ChannelNorm(dims[-1]),
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()


class PlacedPatches(nn.Module):
    """Patches and their learned positions: (B, C, H, W) → (B, out, H/stride, W/stride)."""

    def __init__(self, dim: int, out_dim: int, stride: int, side: int) -> None:
        super().__init__()
        self.patches = Downsample(dim, out_dim, stride)
        self.positions = Positions((side, side), out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        return self.positions(x.flatten(1, 2), grid=grid).unflatten(1, grid).permute(0, 3, 1, 2)


@register(
    Card(
        name="agent_pvt",
        title=_TITLE,
        paper="2312.08874",
        system="agent_attention",
        family="tokens",
        kind=BACKBONE,
        capabilities=ANY_GRID,
        cost="n N",
        growth=1.0,
        sample={
            "dims": (16, 16), "depths": (1, 1), "heads": (2, 2), "agents": (4, 4), "mlp_ratios": (2, 2),
            "key_reductions": (2, 1), "image": 32, "num_classes": 10,
        },
        sizes=PVT_SIZES,
    )
)  # fmt: skip
class AgentPVT(Pyramid):
    """The pyramid vision transformer with agents in every block, so that keys need not be thinned out.

    Images (B, in_channels, H, W) → logits (B, num_classes). Source: arXiv 2312.08874 (agent_pvt.py, with stages of type
    A). As there, no norm stands between the last block and the head.

    Args:
        key_reductions: how much coarser the map of keys and values is in each stage. image: as for `AgentSwin`.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        agents: Sequence[int] = (9, 16, 49, 49),
        key_reductions: Sequence[int] = (1, 1, 1, 1),
        patch: int = 4,
        image: int = 224,
        qkv_bias: bool = True,
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
    ) -> None:
        sides = [image // (patch * 2**stage) for stage in range(len(depths))]
        if not len(dims) == len(depths) == len(heads) == len(mlp_ratios) == len(agents) == len(key_reductions):
            raise ValueError("dims, depths, heads, mlp_ratios, agents and key_reductions need one entry per stage")
        later = iter(sides[1:])

        def block(place: Place) -> nn.Module:
            stage = place.stage
            mixer = AgentAttention(
                place.dim,
                heads=heads[stage],
                agents=agents[stage],
                grid=(sides[stage], sides[stage]),
                reduction=key_reductions[stage],
                bias=qkv_bias,
            )
            ratio = mlp_ratios[stage]
            return Block(place.dim, mixer, layout="tokens", mlp=ratio, norm=_FINE, drop_path=place.drop_path)

        super().__init__(
            dims=dims,
            depths=depths,
            strides=(patch, *(2,) * (len(depths) - 1)),
            stem=PlacedPatches(in_channels, dims[0], patch, sides[0]),
            downsample=lambda before, after, stride: PlacedPatches(before, after, stride, next(later)),
            block=block,
            in_channels=in_channels,
            num_classes=num_classes,
            drop_path=drop_path,
        )
        self.init_weights()


def _per(unit: str, name: str, value: int | Sequence[int], count: int) -> Sequence[int]:
    values = [value] * count if isinstance(value, int) else value
    if len(values) != count:
        raise ValueError(f"{name} must be one number or one per {unit} ({count}), got {len(values)}")
    return values
