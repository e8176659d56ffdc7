"""New classes, task by task, without forgetting: each task has a lane of its own beside a frozen ViT (MULTI-LANE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.models.skeletons.prompts import freeze
from attnlab.nn.multihead import MultiHead


def summarise(selectors: Tensor, x: Tensor) -> Tensor:
    """What each selector finds in the tokens: Σ_n softmax_n(selector · x_n / √C) x_n.

    selectors (B, T, S, C) of T lanes, x (B, N, C) → (B, T, S, C). One head: the scale is that of all channels.
    """
    return attend(selectors, x[:, None], x[:, None])


def merged(x: Tensor, most: int) -> Tensor:
    """x (B, N, C), a class token first, → (B, M, C), M ≤ `most`: alike tokens averaged until so few are left.

    Token merging (arXiv 2210.09461), half of the tokens at a time: of every second token, the class token apart, the
    most similar to one of the others joins the mean of those that join it. What stays comes first, in its order.
    """
    while (count := x.shape[1]) > max(most, 2):
        gone = min(count // 2, (count - 1) // 2)
        unit = F.normalize(x, dim=-1)
        likeness = unit[:, ::2] @ unit[:, 1::2].mT
        likeness[:, 0] = -torch.inf
        best, into = likeness.max(-1)
        order = best.argsort(-1, descending=True)
        leave, stay = order[:, :gone], order[:, gone:].sort(-1).values

        def take(t: Tensor, index: Tensor) -> Tensor:
            return t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))

        target = into.gather(1, leave)[..., None].expand(-1, -1, x.shape[-1])
        joined = x[:, 1::2].scatter_reduce(1, target, take(x[:, ::2], leave), "mean")
        x = torch.cat((take(x[:, ::2], stay), joined), 1)
    return x


def lane_attention(
    mixer: MultiHead, x: Tensor, lanes: Tensor, prefix: Tensor | None = None, *, replace: bool = True,
    first: bool = True, merge: int = 0,
) -> Tensor:  # fmt: skip
    """One layer's attention in T lanes beside the stream x (B, N, C): (B, T, 1 + S, C) to the same, all normed before.

        keys = [prefix; class token; summaries of x by the selectors];  class token ← attention(class token, keys)

    The selectors go back as they came ("drop and replace"), so that only the class token's row is computed at all.
    `prefix` (2, T, K, H, D) are a task's own keys and values. No gradient reaches x.

    Ablations: with replace=False the `first` layer summarises, and from then on the lanes attend to themselves and
    keep all rows; with `merge`, x itself is merged to so few tokens, its class token asks, and (B, T, 1, C) results.
    """
    batch, tasks = lanes.shape[:2]
    x = x.detach()
    if merge:
        seen = merged(x, merge)[:, None].expand(-1, tasks, -1, -1)
    elif replace or first:
        seen = torch.cat((lanes[:, :, :1], summarise(lanes[:, :, 1:], x)), 2)
    else:
        seen = lanes
    seen = seen.flatten(0, 1)
    q, k, v = mixer.project(seen[:, :1] if replace or merge else seen, seen)
    if prefix is not None:
        own = prefix.transpose(2, 3).expand(batch, *(-1,) * 5).transpose(0, 1).flatten(1, 2)
        k, v = torch.cat((own[0], k), 2), torch.cat((own[1], v), 2)
    out = mixer.merge(attend(q, k, v)).unflatten(0, (batch, tasks))
    return out if merge or not replace else torch.cat((out, lanes[:, :, 1:]), 2)


def lane_block(
    block: TokenBlock, x: Tensor, lanes: Tensor, prefix: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """A frozen block on its own stream (B, N, C), and with the same weights on the lanes (B, T, 1 + S, C).

    `options` are those of `lane_attention`.
    """
    seen, mixer = block.norm1(x), cast(MultiHead, block.mixer)
    lanes = block.after(lanes, lane_attention(mixer, seen, block.norm1(lanes), prefix, **options))
    with torch.no_grad():
        y = block.mixer(seen)
    return block.after(x, y), lanes


@register(
    Card(
        name="multilane",
        title="Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning",
        paper="",
        system="multilane",
        family="prompting",
        kind=RECIPE,
        cost="N² + T S N",
    )
)
class MultiLane(nn.Module):
    """Learns tasks one after another on a frozen ViT; what was learned stays, as each task has a lane of its own.

        lane_t = [class token; selectors_t]  (1 + S tokens), through the ViT's own weights, layer by layer:
        keys of a lane = [prefix prompts_t; class token; summaries of the patches by its selectors]
        logits (B, classes) = Σ_t head(c_t / |c_t|) on the classes of task t alone        c_t the lane's class token

    In training the current lane alone runs, in evaluation all of them so far, in parallel:

        model = MultiLane(vit, classes=[[0, 1], [2, 3], …])
        for task in …:
            loss = model.loss(model(images), targets)       # targets (B, classes), several true at once
            model.next_task()                               # a new lane, which starts as a copy; a new optimiser

    Per task S·C + layers·2·K·C parameters, and the head. Cost of a layer's lane: O(S N C + S C²), beside the frozen
    stream's 12NC² + 2N²C. Selectors take residual sums layer by layer, and so drift though they are "replaced".
    Source: Less is more, CoLLAs 2024 (PMLR 274; no arXiv id known); tdemin16/multi-lane. There Adam, no weight
    decay: COCO rate 0.03·batch/256, 30 epochs per task of 10 classes.

    Args:
        backbone: a `Plain` network with a class token and `MultiHead` mixers; becomes a part of this module, frozen.
        classes: of each task, by number, from 0 on.
        selectors, prompts: S and K; layers: how many, from the first, have prefix prompts.
        matched: evaluate each image in one lane, that of the task whose learned key is most like the frozen class
            token (the paper's ablation), in place of all.
        replace: False keeps what attention makes of the summaries, in place of the selectors, from layer to layer.
        merge: summaries are the frozen tokens themselves, merged by likeness to at most `selectors` and so the same in
            all lanes, which then differ by their prompts alone. Both are ablations of the paper.
    """

    def __init__(
        self,
        backbone: Plain,
        classes: Sequence[Sequence[int]],
        *,
        selectors: int = 20,
        prompts: int = 20,
        layers: int = 5,
        matched: bool = False,
        replace: bool = True,
        merge: bool = False,
    ) -> None:
        super().__init__()
        mixers = [cast(TokenBlock, block).mixer for block in backbone.encoder.blocks]
        if backbone.class_token is None or not all(isinstance(m, MultiHead) for m in mixers):
            raise TypeError("backbone must be a Plain network with a class token and MultiHead mixers")
        numbers = sorted(n for task in classes for n in task)
        if numbers != list(range(len(numbers))) or not all(classes):
            raise ValueError(f"classes must hold each number from 0 on once, no task empty, got {list(classes)}")
        if not 0 <= layers <= len(mixers) or selectors < 1 or prompts < 1:
            raise ValueError(
                f"layers must be from 0 to {len(mixers)}, selectors and prompts at least 1, "
                f"got {layers}, {selectors} and {prompts}"
            )
        if merge and not (replace and layers):
            raise ValueError("merge wants prompts in some layers and replace=True: there are no selectors to keep")
        self.backbone, self.task, self.matched = backbone, 0, matched
        self.replace, self.most = replace, selectors if merge else 0
        freeze(backbone)
        dim, heads = backbone.channels[0], cast(MultiHead, mixers[0]).heads
        tasks = len(classes)
        rows = torch.empty(tasks, 0, dim) if merge else nn.init.orthogonal_(torch.empty(tasks, selectors, dim))
        self.selectors = nn.Parameter(rows, requires_grad=not merge)
        self.prompts = nn.ParameterList(
            nn.init.orthogonal_(torch.empty(2, tasks, prompts, heads, dim // heads)) for _ in range(layers)
        )
        self.keys = nn.Parameter(torch.randn(tasks, dim)) if matched else None
        self.head = nn.Linear(dim, len(numbers))
        owned = torch.zeros(tasks, len(numbers), dtype=torch.bool)
        for task, own in enumerate(classes):
            owned[task, list(own)] = True
        self.owned: Tensor
        self.register_buffer("owned", owned, persistent=False)

    def train(self, mode: bool = True) -> MultiLane:
        super().train(mode)
        self.backbone.eval()
        return self

    def get_extra_state(self) -> int:
        return self.task

    def set_extra_state(self, state: int) -> None:
        self.task = state

    def lanes(self, images: Tensor, tasks: slice) -> tuple[Tensor, Tensor]:
        """The class tokens of some lanes (B, T, C), of length 1, and that of the frozen stream (B, C)."""
        net = self.backbone
        with torch.no_grad():
            x, _ = net.embed(images)
        chosen = self.selectors[tasks]
        token = cast(Tensor, net.class_token).expand(len(chosen), 1, -1)
        lanes = torch.cat((token, chosen), 1).expand(len(x), -1, -1, -1)
        for layer, block in enumerate(net.encoder.blocks):
            prefix = self.prompts[layer][:, tasks] if layer < len(self.prompts) else None
            how = {"replace": self.replace, "first": layer == 0, "merge": self.most}
            x, lanes = lane_block(cast(TokenBlock, block), x, lanes, prefix, **how)
        return F.normalize(net.encoder.norm(lanes[:, :, 0]), dim=-1), net.encoder.norm(x[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes): in training of the current lane, in evaluation of every lane for its own classes."""
        if self.training:
            return self.head(self.lanes(images, slice(self.task, self.task + 1))[0][:, 0])
        found, frozen = self.lanes(images, slice(0, self.task + 1))
        logits = self.head(found)
        if self.keys is None:
            return (logits * self.owned[: self.task + 1]).sum(1)
        likeness = F.normalize(frozen, dim=1) @ F.normalize(self.keys[: self.task + 1], dim=1).T
        return logits[torch.arange(len(logits)), likeness.argmax(1)]

    def key_loss(self, images: Tensor) -> Tensor:
        """With `matched`: 1 − the likeness of the current task's key and the frozen class tokens."""
        if self.keys is None:
            raise ValueError("key_loss wants matched=True: there are no keys")
        with torch.no_grad():
            tokens = self.backbone.embed(images)[0]
            frozen = self.backbone.encoder(tokens)[:, 0]
        return (1 - F.cosine_similarity(frozen, self.keys[self.task : self.task + 1])).mean()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of the current task's classes: targets (B, classes), several true at once, or labels (B,), one each.

        With several, the other classes' logits and targets are 0, as the authors have it: a constant. With one, they
        cannot be chosen.
        """
        own = self.owned[self.task]
        if targets.ndim == 1:
            return F.cross_entropy(logits.masked_fill(~own, -torch.inf), targets)
        if targets.shape != logits.shape:
            raise ValueError(f"targets must be {tuple(logits.shape)} or {(len(logits),)}, got {tuple(targets.shape)}")
        return F.binary_cross_entropy_with_logits(logits * own, targets.to(logits) * own)

    @torch.no_grad()
    def next_task(self) -> None:
        """Go on to the next lane, which starts where the last one ended."""
        if self.task + 1 == len(self.owned):
            raise ValueError(f"there are {len(self.owned)} tasks, and the last one is running")
        self.task += 1
        for part in (self.selectors, *((prompts.transpose(0, 1)) for prompts in self.prompts)):
            part[self.task] = part[self.task - 1]


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Of each class, (classes,): the mean precision at each true sample down the ranking.

    Scores and targets (M, classes). NaN for a class without a true sample.
    """
    if scores.shape != targets.shape:
        raise ValueError(f"scores and targets must be of one shape, got {tuple(scores.shape)}, {tuple(targets.shape)}")
    true = targets.to(scores).gather(0, scores.argsort(0, descending=True))
    precision = true.cumsum(0) / torch.arange(1, len(true) + 1, device=true.device)[:, None]
    return (precision * true).sum(0) / true.sum(0)


def f1(scores: Tensor, targets: Tensor, threshold: float = 0.8) -> tuple[float, float]:
    """F1 over all decisions, and that of the classes' mean precision and recall: scores (M, classes) are probabilities,
    true above `threshold`."""
    said, true = scores > threshold, targets.bool()
    hits, claims, wanted = ((t.sum(0).double()) for t in (said & true, said, true))
    overall = 2 * hits.sum() / (claims.sum() + wanted.sum()).clamp(min=1)
    precision, recall = (hits / claims.clamp(min=1)).mean(), (hits / wanted.clamp(min=1)).mean()
    return overall.item(), (2 * precision * recall / (precision + recall).clamp(min=1e-12)).item()


def forgetting(accuracy: Tensor) -> float:
    """How much was lost: accuracy[i, j] on task j after task i; over old tasks, the best − the last."""
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or len(accuracy) < 2:
        raise ValueError(f"accuracy must be (tasks, tasks), of at least 2, got {tuple(accuracy.shape)}")
    return (accuracy[:-1, :-1].tril().amax(0) - accuracy[-1, :-1]).mean().item()
