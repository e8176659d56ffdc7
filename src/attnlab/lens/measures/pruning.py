"""Which heads matter: what changes in a model's answer when a head says nothing (arXiv 2303.13731).

The paper's list of metrics is not public; these five are reconstructed from its abstract and named here:

    d_prob       p_true(full) − p_true(pruned), mean over images: what the right class loses
    abs_d_pred   |p(full) − p(pruned)| of the class that the full model predicts, mean
    jsd          Jensen-Shannon divergence of the two class distributions in bits, in [0, 1], mean
    acc_drop     accuracy(full) − accuracy(pruned)
    cls_cos      1 − cosine of what the classifier reads (the final class token), mean

A head is pruned by its output (before the output projection), not by its logits: zero logits are uniform attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

METRICS = ("jsd", "d_prob", "abs_d_pred", "acc_drop", "cls_cos")
_OF_LABELS = ("d_prob", "acc_drop")


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of images: `logits (images, classes)`, and the `embedding (images, C)` they are read from."""

    logits: Tensor
    embedding: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of heads, `layers × heads`; a head that the model does not have is NaN.

    Leave-one-out: how much the answer changes without the head, so the largest is the most important. Keep-one: how
    much it changes when the head is alone in its layer, so the *smallest* is: it does without the others.

    `scores[metric] (L, H)`; `per_class[metric] (classes, L, H)`, the same over the images of each class in `classes`
    (true classes, or predicted ones where no labels were given): a head of one class hides in the mean over all.
    `names` are the modules of the L layers.
    """

    scores: Mapping[str, Tensor]
    per_class: Mapping[str, Tensor]
    classes: Tensor
    names: list[str]
    mode: str = "leave_one_out"
    ablate: str = "zero"

    def ranks(self, metric: str = "jsd") -> Tensor:
        """The place of each head, `(L, H)`: 1 is the most important, −1 where there is no head; ties keep order."""
        scores = self._of(metric).flatten() * (-1 if self.mode == "keep_one" else 1)
        order = scores.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(1, len(order) + 1, device=order.device)
        return places.masked_fill(scores.isnan(), -1).view(self._of(metric).shape)

    def top(self, count: int, metric: str = "jsd") -> list[tuple[int, int]]:
        """The `count` most important heads as (layer, head); the least important for a negative count."""
        ranks = self.ranks(metric)
        placed = sorted((int(r), divmod(i, ranks.shape[1])) for i, r in enumerate(ranks.flatten()) if r > 0)
        return [head for _, head in (placed[:count] if count >= 0 else placed[count:][::-1])]

    def correlation(self) -> tuple[list[str], Tensor]:
        """Metrics, and Spearman's rank correlation of them over heads, `(M, M)`; NaN where a metric is constant."""
        names = list(self.scores)
        values = torch.stack([self.scores[name].flatten() for name in names]).double()
        ranks = torch.stack([_average_ranks(row[~row.isnan()]) for row in values])
        centred = ranks - ranks.mean(1, keepdim=True)
        norm = centred.norm(dim=1)
        return names, (centred @ centred.mT) / (norm[:, None] * norm)

    def _of(self, metric: str) -> Tensor:
        if metric not in self.scores:
            why = " (it needs labels)" if metric in _OF_LABELS else ""
            raise ValueError(f"metric {metric!r} was not measured{why}; there are {', '.join(self.scores)}")
        return self.scores[metric]


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2, base 2, over the last axis: 0 iff equal, 1 iff disjoint.

    (scipy's `jensenshannon` is the square root of it.)
    """
    middle = (p + q) / 2
    return ((torch.xlogy(p, p) + torch.xlogy(q, q)) / 2 - torch.xlogy(middle, middle)).sum(-1).clamp(0) / _LN2


_LN2 = 0.6931471805599453


def changes(full: Answer, pruned: Answer, labels: Tensor | None = None) -> dict[str, Tensor]:
    """The metrics of each image, `(images,)` each: their means are the scores. Those of labels come with `labels`."""
    p, q = full.logits.double().softmax(-1), pruned.logits.double().softmax(-1)
    guess = p.argmax(-1)
    found = {"jsd": jensen_shannon(p, q), "abs_d_pred": (_of_class(p, guess) - _of_class(q, guess)).abs()}
    if labels is not None:
        found["d_prob"] = _of_class(p, labels) - _of_class(q, labels)
        found["acc_drop"] = (guess == labels).double() - (q.argmax(-1) == labels).double()
    if full.embedding is not None and pruned.embedding is not None:
        a, b = full.embedding.double(), pruned.embedding.double()
        # 1 − cos as ½‖â − b̂‖²: exactly 0 for equal vectors, and without cancellation for near ones.
        found["cls_cos"] = (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1) / 2
    return {name: found[name] for name in METRICS if name in found}


def importance(
    run: Callable[[Mapping[int, Tensor]], Answer],
    heads: list[int],
    labels: Tensor | None = None,
    *,
    mode: str = "leave_one_out",
    names: list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **about: Any,
) -> Importance:
    """Scores every head by one pass with it pruned: Σ heads + 1 passes over the images.

    Args:
        run: what the model answers with some heads pruned: `{layer: (heads,) bool, True for those pruned}`.
        heads: how many there are in each layer.
        labels: true classes `(images,)`; without them d_prob and acc_drop are left out.
        mode: "leave_one_out" prunes the head, "keep_one" all others of its layer.
        progress: called with passes done and to do.
    """
    if mode not in ("leave_one_out", "keep_one"):
        raise ValueError(f"mode must be 'leave_one_out' or 'keep_one', got {mode!r}")
    full = run({})
    if full.logits.ndim != 2:
        raise ValueError(f"logits must be (images, classes), got {tuple(full.logits.shape)}")
    if labels is not None and labels.shape != full.logits.shape[:1]:
        raise ValueError(f"labels must be ({len(full.logits)},), one for each image, got {tuple(labels.shape)}")
    if labels is not None and (labels.min() < 0 or labels.max() >= full.logits.shape[1]):
        raise ValueError(f"labels must be classes from 0 to {full.logits.shape[1] - 1}, got {labels.tolist()}")
    groups = full.logits.argmax(-1) if labels is None else labels
    classes, member = groups.unique(return_inverse=True)
    share = F.one_hot(member).double() / member.bincount()  # (images, classes)
    shape = (len(heads), max(heads, default=0))
    scores: dict[str, Tensor] = {}
    per_class: dict[str, Tensor] = {}
    done = 0
    for layer, count in enumerate(heads):
        for head in range(count):
            one = torch.arange(count) == head
            found = changes(full, run({layer: ~one if mode == "keep_one" else one}), labels)
            for name, values in found.items():
                scores.setdefault(name, values.new_full(shape, torch.nan))[layer, head] = values.mean()
                table = per_class.setdefault(name, values.new_full((len(classes), *shape), torch.nan))
                table[:, layer, head] = values @ share
            done += 1
            if progress is not None:
                progress(done, sum(heads))
    return Importance(scores, per_class, classes, names or [str(i) for i in range(len(heads))], mode, **about)


def _of_class(p: Tensor, which: Tensor) -> Tensor:
    return p.gather(-1, which[:, None])[:, 0]


def _average_ranks(x: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean."""
    below = (x[:, None] > x).sum(1)
    return below + ((x[:, None] == x).sum(1) - 1) / 2.0
