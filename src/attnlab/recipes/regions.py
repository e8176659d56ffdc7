"""Pre-training on labelled regions of large images: boxes are classified, and drawn to their category's vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register

_TITLE = "DynamicVis: An Efficient and General Visual Foundation Model for Remote Sensing Image Understanding"


@register(
    Card(
        name="multi_instance_loss",
        title=_TITLE,
        paper="2503.16426",
        family="loss",
        kind=RECIPE,
        cost="R K",
    )
)
def multi_instance_loss(
    features: Tensor, embeddings: Tensor, labels: Tensor, *, scale: float | Tensor = 1 / 0.07, weight: float = 0.5
) -> Tensor:
    """Draws regions to the embedding of their category, and embeddings to all regions that have them: a scalar.

        z = scale · f eᵀ, of vectors of length one
        loss = weight / 2 · (mean over regions of −log softmax_categories(z) at the label
                             + mean over categories present of −log Σ_(regions of it) softmax_regions(z))

    features (R, C), embeddings (K, C), labels (R) in [0, K). Over several processes give all of their regions, see
    `gather_regions`. Source: arXiv 2503.16426 (KyanChen/DynamicVis).
    """
    if features.ndim != 2 or embeddings.ndim != 2 or features.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"features must be (R, C) and embeddings (K, C), got {tuple(features.shape)}, {tuple(embeddings.shape)}"
        )
    if labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(f"labels must have shape {tuple(features.shape[:1])}, not empty, got {tuple(labels.shape)}")
    z = scale * F.normalize(features, dim=1) @ F.normalize(embeddings, dim=1).T
    of = F.one_hot(labels, len(embeddings)).bool()
    present = of.any(0)
    # The logarithm of a sum of probabilities, without leaving logarithms.
    of_regions = z.log_softmax(0).masked_fill(~of, -math.inf)[:, present].logsumexp(0)
    return -weight / 2 * (z.log_softmax(1)[of].mean() + of_regions.mean())


def gather_regions(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Regions of all processes, in the order of their ranks; gradients reach this process's alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return features, labels
    found: list[tuple[Tensor, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (features.detach().cpu(), labels.cpu()))
    found[dist.get_rank()] = (features, labels)
    pairs = [(f.to(features), n.to(labels)) for f, n in found]  # type: ignore[misc]
    return torch.cat([f for f, _ in pairs]), torch.cat([n for _, n in pairs])


def region_align(maps: Tensor, boxes: Sequence[Tensor], stride: int, *, size: int = 7, samples: int = 2) -> Tensor:
    """What `maps` (B, C, H, W) hold in boxes: `(R, C, size, size)`, the boxes of the first image first.

    boxes: per image `(R_i, 4)` as left, top, right, bottom in pixels of the image, which lie in it. Each cell is the
    mean of `samples`² bilinear samples (RoIAlign, arXiv 1703.06870, aligned).
    """
    if len(boxes) != len(maps) or any(b.ndim != 2 or b.shape[1] != 4 for b in boxes):
        raise ValueError(f"boxes must be {len(maps)} tensors (R, 4), got {[tuple(b.shape) for b in boxes]}")
    count = size * samples
    steps = (torch.arange(count, device=maps.device, dtype=maps.dtype) + 0.5) / count
    width, height = maps.shape[3] * stride, maps.shape[2] * stride
    found = []
    for one, box in zip(maps, boxes, strict=True):
        if not len(box):
            continue
        left, top, right, bottom = box.to(maps).unbind(1)
        x = torch.lerp(left[:, None], right[:, None], steps) * 2 / width - 1
        y = torch.lerp(top[:, None], bottom[:, None], steps) * 2 / height - 1
        grid = torch.stack((x[:, None].expand(-1, count, -1), y[:, :, None].expand(-1, -1, count)), -1)
        # All boxes of an image below each other are one picture to sample.
        cells = F.grid_sample(one[None], grid.flatten(0, 1)[None], padding_mode="border", align_corners=False)[0]
        found.append(F.avg_pool2d(cells.unflatten(1, (len(box), count)).transpose(0, 1), samples))
    return torch.cat(found) if found else maps.new_zeros(0, maps.shape[1], size, size)


class WhereAttention(nn.Module):
    """x + γ · Wo attention, whose scores ask each place what it wants from which distance: `(B, C, H, W)` to the same.

        score of place i for place j = q_i · (Wx e(x_i − x_j) + Wy e(y_i − y_j)) / √2,   keys at every second place

    e: sines and cosines. (GeneralizedAttention of arXiv 1904.05873, attention type "0100".) γ is 0 at first.
    """

    def __init__(self, dim: int, *, heads: int = 6, stride: int = 2) -> None:
        super().__init__()
        if dim % 4 or dim < heads:
            raise ValueError(f"dim must be a multiple of 4, at least heads={heads}, got {dim}")
        self.heads, self.stride = heads, stride
        inner = dim // heads * heads
        self.query, self.value = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.across, self.down = nn.Linear(dim // 2, inner, bias=False), nn.Linear(dim // 2, inner, bias=False)
        self.wo = nn.Linear(inner, dim)
        self.gamma = nn.Parameter(torch.zeros(()))
        speeds = 1000.0 ** (-torch.arange(dim // 4) / (dim // 4))
        self.speeds: Tensor
        self.register_buffer("speeds", speeds, persistent=False)
        for linear in (self.query, self.value, self.across, self.down, self.wo):
            nn.init.kaiming_uniform_(linear.weight, a=1)
        nn.init.zeros_(self.wo.bias)

    def _far(self, size: int, project: nn.Linear) -> Tensor:
        """`(heads, size, size / stride, D)` of one axis."""
        places = torch.arange(size, device=self.speeds.device)
        angles = (places[:, None] - places[:: self.stride])[..., None] * self.speeds
        features = torch.cat((angles.sin(), angles.cos()), -1).to(project.weight)
        return project(features).unflatten(-1, (self.heads, -1)).movedim(2, 0) / math.sqrt(2)

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        tokens = x.permute(0, 2, 3, 1)
        q = self.query(tokens).unflatten(-1, (self.heads, -1))
        across = torch.einsum("byxhd,hxkd->bhyxk", q, self._far(width, self.across))
        down = torch.einsum("byxhd,hykd->bhyxk", q, self._far(height, self.down))
        weights = (down.unsqueeze(-1) + across.unsqueeze(-2)).flatten(-2).softmax(-1)
        v = self.value(tokens[:, :: self.stride, :: self.stride]).flatten(1, 2).unflatten(-1, (self.heads, -1))
        found = torch.einsum("bhyxk,bkhd->byxhd", weights, v).flatten(-2)
        return x + self.gamma * self.wo(found).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """Maps of all stages in one width, each with what the coarser ones know (FPN, arXiv 1612.03144)."""

    def __init__(self, channels: Sequence[int], width: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found = [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]
        for i in range(len(found) - 1, 0, -1):
            found[i - 1] = found[i - 1] + F.interpolate(found[i], size=found[i - 1].shape[2:])
        return [smooth(m) for smooth, m in zip(self.smooth, found, strict=True)]


@register(
    Card(
        name="region_pretraining",
        title=_TITLE,
        paper="2503.16426",
        family="supervision",
        kind=RECIPE,
        cost="backbone + R",
    )
)
class RegionPretraining(nn.Module):
    """Trains a backbone on boxes with labels: each is pooled from all stages, classified, and drawn to its category.

        maps = fpn(backbone(images));   f = attention(Σ_stages relu(conv5×5(align(maps, boxes))), mean over 7×7
        loss = CE(W f, labels), smoothed by 0.1, + multi_instance_loss(f, embeddings, labels)

        pretraining = RegionPretraining(DynamicVis(num_classes=0), classes=63)
        loss = pretraining.loss(images, boxes, labels)            boxes and labels: one tensor per image

    The authors train on fMoW at 512², flipped and resized by 0.1 to 2, by AdamW (4e-4, betas 0.9 and 0.95, weight decay
    0.05), a cosine to a hundredth and 200 epochs. Source: arXiv 2503.16426 (KyanChen/DynamicVis).

    Args:
        backbone: with `forward_features`, `channels` and `reductions`.
        width: of the pyramid and the regions. weight: of the multi-instance loss.
    """

    def __init__(
        self, backbone: nn.Module, *, classes: int, width: int = 256, heads: int = 6, smoothing: float = 0.1,
        weight: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        if not all(hasattr(backbone, name) for name in ("forward_features", "channels", "reductions")):
            raise TypeError(f"backbone must give maps by forward_features, {type(backbone).__name__} does not")
        self.backbone, self.smoothing, self.weight = backbone, smoothing, weight
        self.pyramid = FeaturePyramid(backbone.channels, width)  # type: ignore[arg-type]
        self.refine, self.attention = nn.Conv2d(width, width, 5, padding=2), WhereAttention(width, heads=heads)
        self.head = nn.Linear(width, classes)
        self.embeddings = nn.Parameter(torch.randn(classes, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """One vector per box, `(R, width)`."""
        maps = self.pyramid(self.backbone.forward_features(images))  # type: ignore[operator]
        strides: tuple[int, ...] = self.backbone.reductions  # type: ignore[assignment]
        regions = torch.zeros(())
        for one, stride in zip(maps, strides, strict=True):
            regions = regions + F.relu(self.refine(region_align(one, boxes, stride)))
        return self.attention(regions).mean((2, 3))

    def forward(self, images: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Logits of every box, `(R, classes)`."""
        return self.head(self.features(images, boxes))

    def loss(self, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        features, wanted = self.features(images, boxes), torch.cat(list(labels))
        classified = F.cross_entropy(self.head(features), wanted, label_smoothing=self.smoothing)
        features, wanted = gather_regions(features, wanted)
        scale = self.log_scale.exp()
        return classified + multi_instance_loss(features, self.embeddings, wanted, scale=scale, weight=self.weight)
