"""One table for rare and frequent words: an embedding, and a softmax that looks at rare words only when asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptiveVocabulary(nn.Module):
    """Embedding and softmax of words sorted by frequency, in clusters; both use one table `weight (V, C)`.

        log p(word i) = log softmax([frequent words, clusters])_i                           among the frequent ones
                      = log softmax(…)_cluster + log softmax(words of the cluster)_i        in a cluster behind

    `loss` computes for each token the frequent words and the target's cluster alone; `log_probabilities` computes
    everything. Sources: arXiv 1609.04309, 1901.02860 (whose order of clusters this has: the first is the last row).

    Args:
        words, dim: V, C.
        cutoffs: where the clusters behind the frequent words begin; none is one plain softmax.
    """

    def __init__(self, words: int, dim: int, cutoffs: Sequence[int] = ()) -> None:
        super().__init__()
        self.edges = (0, *cutoffs, words)
        if any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"cutoffs must rise from above 0 to below words = {words}, got {tuple(cutoffs)}")
        self.weight = nn.Parameter(torch.randn(words, dim) * 0.01)
        self.bias = nn.Parameter(torch.zeros(words))
        self.cluster_weight = nn.Parameter(torch.randn(len(cutoffs), dim) * 0.01) if cutoffs else None
        self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs))) if cutoffs else None

    def embed(self, ids: Tensor) -> Tensor:
        """`(…)` to `(…, C)`, times √C."""
        return F.embedding(ids, self.weight) * self.weight.shape[1] ** 0.5

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Of every word after each token: `(…, C)` to `(…, V)`."""
        head, clusters = self._head(x)
        rest = (self._within(x, i) + clusters[..., -i, None] for i in range(1, len(self.edges) - 1))
        return torch.cat((head, *rest), -1)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """−log p of each target: `(…, C)` and `(…)` to `(…)`."""
        tokens, wanted = x.flatten(0, -2), targets.flatten()
        head, clusters = self._head(tokens)
        found = head.gather(-1, wanted.clamp(max=self.edges[1] - 1)[:, None]).squeeze(-1)
        for i in range(1, len(self.edges) - 1):
            here = ((wanted >= self.edges[i]) & (wanted < self.edges[i + 1])).nonzero().squeeze(-1)
            word = (wanted[here] - self.edges[i])[:, None]
            inside = self._within(tokens[here], i).gather(-1, word).squeeze(-1)
            found = found.index_put((here,), inside + clusters[here, -i])
        return -found.view(targets.shape)

    def _head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities of the frequent words, and of the clusters."""
        weight, bias = self.weight[: self.edges[1]], self.bias[: self.edges[1]]
        if self.cluster_weight is not None and self.cluster_bias is not None:
            weight, bias = torch.cat((weight, self.cluster_weight)), torch.cat((bias, self.cluster_bias))
        found = F.linear(x, weight, bias).log_softmax(-1)
        return found[..., : self.edges[1]], found[..., self.edges[1] :]

    def _within(self, x: Tensor, cluster: int) -> Tensor:
        words = slice(self.edges[cluster], self.edges[cluster + 1])
        return F.linear(x, self.weight[words], self.bias[words]).log_softmax(-1)
