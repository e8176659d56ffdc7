"""BERT: a text encoder with post-norm blocks, at the sizes of the released models and of MiniLM's students."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from attnlab.cards import LM, Card, Size, register
from attnlab.models.skeletons.parts import MLP
from attnlab.nn.multihead import MultiHead
from attnlab.patterns import Explicit


def _size(params: int, depth: int, dim: int) -> Size:
    return Size(params, dict(dim=dim, depth=depth, heads=12, output="pooled"))


# Parameters with the pooler, as in transformers' `BertModel`; the students are those of MiniLM (arXiv 2002.10957).
SIZES = {
    "bert_base": _size(109_482_240, 12, 768),
    "minilm_6x768": _size(66_955_008, 6, 768),
    "minilm_12x384": _size(33_360_000, 12, 384),
    "minilm_6x384": _size(22_713_216, 6, 384),
    "minilm_4x384": _size(19_164_288, 4, 384),
    "minilm_3x384": _size(17_389_824, 3, 384),
}


class PostNormBlock(nn.Module):
    """x = norm1(x + mixer(x)), then x = norm2(x + mlp(x)): `(B, N, C)` → the same."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.mixer = MultiHead(dim, heads=heads, bias=True, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, hidden)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pattern: Explicit | None = None) -> Tensor:
        x = self.norm1(x + self.dropout(self.mixer(x, pattern=pattern)))
        return self.norm2(x + self.dropout(self.mlp(x)))


@register(
    Card(
        name="bert",
        title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        paper="1810.04805",
        system="minilm",
        family="language",
        kind=LM,
        cost="N²",
        growth=2.0,
        sample=dict(vocabulary=64, dim=32, depth=2, heads=4, length=32),
        sizes=SIZES,
    )
)
class Bert(nn.Module):
    """Encodes a text from both sides: words + positions + segments → norm → post-norm blocks.

        logits (B, N, vocabulary) = bert(ids (B, N), segments=None, keep=None)

    `keep` (B, N) is True, or 1, at words and false at padding, which nobody sees; `segments` (B, N) are 0 where None.
    `encode` gives the words' vectors (B, N, dim). Cost per block: 12NC² + 2N²C. Source: arXiv 1810.04805.

    Args:
        output: what `forward` gives: "words", the masked words' logits, through a dense layer, GELU, a norm and the
            embedding's own weights; "pooled", tanh of a dense layer of the first word (B, dim); "tokens", `encode`.
        hidden: the width inside the feed-forward; 4 · dim if None.
        length: the longest text.
        pad: the id of padding, where places are counted as RoBERTa does (arXiv 1907.11692): along the ids that are not
            `pad`, from pad + 1 in the table, which is so much longer; padding's own place and word stay untrained.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 30522,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int | None = None,
        length: int = 512,
        segments: int = 2,
        pad: int | None = None,
        output: str = "words",
        dropout: float = 0.1,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if output not in ("words", "pooled", "tokens"):
            raise ValueError(f"output must be 'words', 'pooled' or 'tokens', got {output!r}")
        if pad is not None and not 0 <= pad < vocabulary:
            raise ValueError(f"pad must be an id below vocabulary = {vocabulary}, got {pad}")
        self.length, self.output, self.pad = length, output, pad
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.words = nn.Embedding(vocabulary, dim, padding_idx=pad)
        self.positions = nn.Embedding(length if pad is None else length + pad + 1, dim, padding_idx=pad)
        self.segments = nn.Embedding(segments, dim)
        self.norm, self.dropout = norm(dim), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(dim, heads, 4 * dim if hidden is None else hidden, dropout, norm_eps) for _ in range(depth)
        )
        if output == "words":
            self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), norm(dim))
            self.bias = nn.Parameter(torch.zeros(vocabulary))
        elif output == "pooled":
            self.pool = nn.Linear(dim, dim)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(self, ids: Tensor, segments: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """The words' vectors after the last block, (B, N, dim)."""
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.length:
            raise ValueError(f"ids must be (B, N) with 1 ≤ N ≤ length = {self.length}, got {tuple(ids.shape)}")
        for name, given in (("segments", segments), ("keep", keep)):
            if given is not None and given.shape != ids.shape:
                raise ValueError(f"{name} must have the shape of ids, {tuple(ids.shape)}, got {tuple(given.shape)}")
        n = ids.shape[1]
        first = self.segments.weight[0] if segments is None else self.segments(segments)
        x = self.dropout(self.norm(self.words(ids) + self._places(ids) + first))
        pattern = None if keep is None else Explicit(keep.bool()[:, None, None].expand(-1, 1, n, -1))
        for block in self.blocks:
            x = block(x, pattern)
        return x

    def _places(self, ids: Tensor) -> Tensor:
        if self.pad is None:
            return self.positions.weight[: ids.shape[1]]
        words = ids != self.pad
        return self.positions(words.cumsum(1) * words + self.pad)

    def predict(self, x: Tensor) -> Tensor:
        """The logits (…, vocabulary) of the words at vectors (…, dim) of `encode`: only of the masked ones, say."""
        return nn.functional.linear(self.transform(x), self.words.weight, self.bias)

    def forward(self, ids: Tensor, segments: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        x = self.encode(ids, segments, keep)
        if self.output == "pooled":
            return self.pool(x[:, 0]).tanh()
        return self.predict(x) if self.output == "words" else x
