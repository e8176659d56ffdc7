"""Few-shot classes from a few images and their names: nearest-key attention with prompts from text (KTPP)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.parts import trunc_normal_linear
from attnlab.models.skeletons.plain import TokenBlock
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.knn_context import Context, KNNContext
from attnlab.recipes.layers import plain_blocks


class Episode(NamedTuple):
    """A few-shot task: rows of a data set."""

    classes: Tensor  # (W,) their labels
    support: Tensor  # (W, S) images to learn from
    queries: Tensor  # (W, Q) images to classify


def draw_episode(
    labels: Tensor, *, ways: int = 5, shots: int = 1, queries: int = 15, generator: torch.Generator | None = None
) -> Episode:
    """Random classes of `labels` (N,), and of each so many images to learn from and others to classify."""
    if min(ways, shots, queries) < 1:
        raise ValueError(f"ways, shots and queries must be at least 1, got {ways}, {shots} and {queries}")
    known, counts = labels.unique(return_counts=True)
    known = known[counts >= shots + queries]
    if len(known) < ways:
        raise ValueError(f"labels must hold {ways} classes of {shots + queries} images, got {len(known)}")
    classes = known[torch.randperm(len(known), generator=generator)[:ways]]
    order = torch.randperm(len(labels), generator=generator)
    rows = torch.stack([order[labels[order] == label][: shots + queries] for label in classes])
    return Episode(classes, rows[:, :shots], rows[:, shots:])


class PyramidPrompts(nn.Module):
    """Class prompts that read feature maps from coarse to fine, by a head of their own at each scale.

        p ← p + softmax((p Wq)(F_s Wk)ᵀ / √C) F_s Wv        for s in scales; F_s the maps pooled to s×s

    prompts (B, C), maps (B, M, C, H, W), of which there may be several for each prompt → (B, C).
    """

    def __init__(self, dim: int, scales: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        if not scales or min(scales) < 1 or any(a > b for a, b in pairwise(scales)):
            raise ValueError(f"scales must be sizes of at least 1, from coarse to fine, got {tuple(scales)}")
        self.scales = tuple(scales)
        self.wq, self.wkv = (
            nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in scales) for width in (dim, 2 * dim)
        )

    def forward(self, prompts: Tensor, maps: Tensor) -> Tensor:
        p = prompts.unsqueeze(1)
        for scale, wq, wkv in zip(self.scales, self.wq, self.wkv, strict=True):
            pooled = F.adaptive_avg_pool2d(maps.flatten(0, 1), scale).unflatten(0, maps.shape[:2])
            k, v = wkv(pooled.movedim(2, -1).flatten(1, 3)).chunk(2, -1)
            p = p + F.scaled_dot_product_attention(wq(p), k, v)
        return p.squeeze(1)


@register(
    Card(
        name="ktpp",
        title="KNN Transformer with Pyramid Prompts for Few-Shot Learning",
        paper="2410.10227",
        family="few-shot",
        kind=RECIPE,
        cost="N² per stage",
    )
)
class KTPP(nn.Module):
    """Classifies by a few labelled images of each class and the classes' names, through prompts made of the names.

        Z = KNNContext blocks of falling `keep` over the backbone's tokens                 every image
        p_c = PyramidPrompts(LN(W t_c), maps of class c's support)                         t_c its name's embedding
        support of c:  mean over tokens of block([p_c; Z ⊙ σ(Wm p_c + b)])                 prototype_c: their mean
        query:         mean over tokens of block(Z)                                        its name is not known
        logits = τ · cos(query, prototype_c)

        net = KTPP(backbone, text_dim=512, num_classes=64)
        loss = F.cross_entropy(net.classify(images), labels)                               # stage 1: the base classes
        texts = clip.encode_text(tokenize([f"a photo of a {name}" for name in names]))     # frozen, (W, 512)
        logits = net(support, queries, texts)                                              # stage 2, and test: episodes

    Only names of classes that have support images are used, so nothing is leaked. Source: arXiv 2410.10227, of which no
    code was released: what it leaves open is an argument here, its default ours.

    Args:
        backbone: anything whose `forward_features(images)` gives a map (B, C, H, W), or a list with it at its end.
        dim: C; `backbone.channels[-1]` if None.
        keep: the share of the keys of each stage. alpha, context: as for `KNNContext`.
        place: "append" puts the stages behind the backbone; "replace" turns the attention of a `Plain` backbone's last
            blocks into them, with the same weights.
        scales: of the pyramid. modulate: what prompts do to the support's tokens: "gate" as above, "film"
            Z ⊙ (1 + γ) + β, "token" nothing but stand before them.
        query_prompt: "none" as above; "mean" gives queries the mean prompt of the episode; "all" each prompt in turn,
            for the similarity to its class.
        readout: the feature is the "mean" over the output's visual tokens, or the output at the "prompt".
        temperature: where the learned τ starts.
        num_classes: of the classifier of stage 1; 0 for none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        text_dim: int = 512,
        dim: int | None = None,
        heads: int = 8,
        keep: Sequence[float | int] = (0.9, 0.7, 0.5),
        alpha: float = 0.0,
        context: Context = "output",
        place: Literal["append", "replace"] = "append",
        scales: Sequence[int] = (1, 2, 4),
        modulate: Literal["gate", "film", "token"] = "gate",
        query_prompt: Literal["none", "mean", "all"] = "none",
        readout: Literal["mean", "prompt"] = "mean",
        temperature: float = 10.0,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        choices = {
            "place": (place, ("append", "replace")),
            "modulate": (modulate, ("gate", "film", "token")),
            "query_prompt": (query_prompt, ("none", "mean", "all")),
            "readout": (readout, ("mean", "prompt")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if readout == "prompt" and query_prompt == "none":
            raise ValueError("readout='prompt' needs query_prompt 'mean' or 'all': queries have no prompt otherwise")
        if not keep:
            raise ValueError("keep must hold the share of at least one stage")
        if not hasattr(backbone, "forward_features"):
            raise TypeError(f"backbone must have forward_features, got {type(backbone).__name__}")
        if dim is None:
            if not hasattr(backbone, "channels"):
                raise TypeError(f"dim must be given: {type(backbone).__name__} has no channels")
            dim = cast(Sequence[int], backbone.channels)[-1]
        self.backbone, self.modulate, self.query_prompt, self.readout = backbone, modulate, query_prompt, readout

        def attention(share: float | int) -> KNNContext:
            return KNNContext(dim, heads=heads, keep=share, alpha=alpha, context=context)

        self.stages = nn.ModuleList()
        if place == "append":
            self.stages.extend(TokenBlock(dim, attention(share)) for share in keep)
        self.block = TokenBlock(dim, attention(keep[-1]))
        self.text = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        self.pyramid = PyramidPrompts(dim, scales)
        self.modulator = None if modulate == "token" else nn.Linear(dim, dim if modulate == "gate" else 2 * dim)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.head = nn.Linear(dim, num_classes) if num_classes else None
        for part in (self.stages, self.block, self.text, self.pyramid, self.modulator):
            if part is not None:
                part.apply(trunc_normal_linear)
        if place == "replace":
            _replace_last(backbone, keep, alpha, context)

    def maps(self, images: Tensor) -> Tensor:
        """The visual path, without any prompt: images (B, …) → maps (B, C, H, W) behind the stages."""
        found = cast(Any, self.backbone).forward_features(images)
        found = found if isinstance(found, Tensor) else found[-1]
        grid, x = found.shape[2:], found.flatten(2).mT
        for stage in self.stages:
            x = stage(x)
        return x.mT.unflatten(2, grid)

    def prompts(self, texts: Tensor, maps: Tensor) -> Tensor:
        """One prompt for each class (W, C), from its name's embedding (W, T) and its support's maps (W, S, C, H, W)."""
        if len(texts) != len(maps):
            raise ValueError(f"texts must be one for each of the {len(maps)} classes of the support, got {len(texts)}")
        return self.pyramid(self.text(F.normalize(texts, dim=-1)), maps)

    def feature(self, maps: Tensor, prompts: Tensor | None = None) -> Tensor:
        """What is compared, (B, C), of maps (B, C, H, W) and of each one's prompt (B, C), if it has one."""
        z = maps.flatten(2).mT
        if prompts is None:
            return self.block(z).mean(1)
        p = prompts.unsqueeze(1)
        if self.modulator is not None and self.modulate == "gate":
            z = z * self.modulator(p).sigmoid()
        elif self.modulator is not None:
            scale, shift = self.modulator(p).chunk(2, -1)
            z = z * (1 + scale) + shift
        y = self.block(torch.cat((p, z), 1))
        return y[:, 1:].mean(1) if self.readout == "mean" else y[:, 0]

    def classify(self, images: Tensor) -> Tensor:
        """Logits of the base classes, by the visual path alone."""
        if self.head is None:
            raise ValueError("classify needs num_classes of at least 1")
        return self.head(self.feature(self.maps(images)))

    def forward(self, support: Tensor, queries: Tensor, texts: Tensor) -> Tensor:
        """Support images (W, S, …), queries (Q, …) and the embedded names of the W classes (W, T) → logits (Q, W)."""
        if support.ndim != queries.ndim + 1 or support.shape[2:] != queries.shape[1:]:
            raise ValueError(
                f"support must be (ways, shots, …) images like those of queries {tuple(queries.shape)}, "
                f"got {tuple(support.shape)}"
            )
        ways, shots = support.shape[:2]
        maps = self.maps(torch.cat((support.flatten(0, 1), queries)))
        shown, asked = maps[: ways * shots], maps[ways * shots :]
        prompts = self.prompts(texts, shown.unflatten(0, (ways, shots)))
        prototypes = self.feature(shown, prompts.repeat_interleave(shots, 0)).unflatten(0, (ways, shots)).mean(1)
        if self.query_prompt == "all":
            each = self.feature(asked.repeat_interleave(ways, 0), prompts.repeat(len(asked), 1))
            return self.temperature * F.cosine_similarity(each.unflatten(0, (-1, ways)), prototypes, dim=-1)
        mean = prompts.mean(0).expand(len(asked), -1) if self.query_prompt == "mean" else None
        return self.temperature * F.normalize(self.feature(asked, mean), dim=1) @ F.normalize(prototypes, dim=1).T


def _replace_last(backbone: nn.Module, keep: Sequence[float | int], alpha: float, context: Context) -> None:
    """The last blocks of a plain vision transformer look at their best keys only."""
    blocks = plain_blocks(backbone)
    if len(keep) > len(blocks):
        raise ValueError(f"keep must be at most {len(blocks)} stages, the backbone's blocks, got {len(keep)}")
    for block, share in zip(blocks[-len(keep) :], keep, strict=True):
        old = cast(MultiHead, block.mixer)
        new = KNNContext(
            old.dim, heads=old.heads, keep=share, alpha=alpha, context=context, bias=old.wqkv.bias is not None
        )
        new.wqkv, new.wo, new.dropout = old.wqkv, old.wo, old.dropout
        block.mixer = new


@torch.no_grad()
def few_shot_accuracy(
    net: KTPP,
    images: Tensor,
    labels: Tensor,
    texts: Tensor,
    *,
    episodes: int = 600,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Mean accuracy over random episodes and its 95 % interval; `texts` (classes, T) are the names by label."""
    net.eval()
    right = []
    for _ in range(episodes):
        task = draw_episode(labels, ways=ways, shots=shots, queries=queries, generator=generator)
        logits = net(images[task.support], images[task.queries.flatten()], texts[task.classes])
        wanted = torch.arange(ways, device=logits.device).repeat_interleave(queries)
        right.append((logits.argmax(1) == wanted).double().mean())
    found = torch.stack(right)
    return found.mean().item(), (1.96 * found.std() / len(found) ** 0.5).item() if len(found) > 1 else float("nan")
