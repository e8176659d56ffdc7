"""SELFormer: a RoBERTa-shaped encoder that reads molecules as SELFIES strings."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from attnlab.cards import LM, Card, Size, register
from attnlab.models.language.bert import Bert

# Parameters of transformers' `RobertaForMaskedLM` at the released settings: vocabulary 800, 514 places, width 768.
SIZES = {
    "selformer": Size(86_658_848, dict(depth=12, heads=4)),
    "selformer_lite": Size(58_307_360, dict(depth=8, heads=12)),
}


@register(
    Card(
        name="selformer",
        title="SELFormer: Molecular Representation Learning via SELFIES Language Models",
        paper="2304.04662",
        system="selformer",
        family="language",
        kind=LM,
        cost="N²",
        growth=2.0,
        sample=dict(vocabulary=64, dim=32, depth=2, heads=4, length=32),
        sizes=SIZES,
    )
)
class Selformer(Bert):
    """Reads molecules: learns by guessing masked tokens of SELFIES strings, then tells properties or embeds.

        logits (B, N, vocabulary) = Selformer()(ids (B, N), keep=keep)              `output="words"`: pre-training
        logits (B, labels) = Selformer(output="labels", labels=1)(ids, keep=keep)   fine-tuning
        vectors (B, dim) = model.embed(ids, keep)

    `SelfiesTokenizer.encode` gives `ids` and `keep`; the first token of each string is its start. Places are RoBERTa's,
    from pad + 1, so that 514 rows hold 512 tokens. Labels = W2 tanh(W1 x₀), x₀ the start's vector, behind dropout each.
    Cost per block: 12NC² + 2N²C. Source: arXiv 2304.04662.

    Args:
        output: "words", "labels" or "tokens" (the vectors).
        labels: how many numbers a molecule gets: its classes, its tasks, or 1 for a regression.
        pad: the padding's id, for the places alone: what is seen, `keep` says. The authors' checkpoints have 1 here,
            whatever their tokenizer's padding is.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 800,
        dim: int = 768,
        depth: int = 12,
        heads: int = 4,
        hidden: int | None = None,
        length: int = 512,
        pad: int = 1,
        output: str = "words",
        labels: int = 2,
        dropout: float = 0.1,
        norm_eps: float = 1e-12,
    ) -> None:
        if output not in ("words", "labels", "tokens"):
            raise ValueError(f"output must be 'words', 'labels' or 'tokens', got {output!r}")
        if labels < 1:
            raise ValueError(f"labels must be at least 1, got {labels}")
        super().__init__(
            vocabulary=vocabulary, dim=dim, depth=depth, heads=heads, hidden=hidden, length=length, segments=1, pad=pad,
            output="tokens" if output == "labels" else output, dropout=dropout, norm_eps=norm_eps,
        )  # fmt: skip
        self.output = output
        if output == "labels":
            self._add_head(labels)

    def _add_head(self, labels: int) -> None:
        dim, rate = self.words.embedding_dim, self.dropout.p
        self.head = nn.Sequential(
            nn.Dropout(rate), nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(rate), nn.Linear(dim, labels)
        )
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def for_labels(self, labels: int) -> Selformer:
        """A copy that gives `labels` numbers per molecule through a new head: what fine-tuning starts from."""
        model = copy.deepcopy(self)
        if model.output == "words":
            del model.transform, model.bias
        model.output = "labels"
        model._add_head(labels)
        return model.to(self.words.weight)

    def embed(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """One vector per molecule, the mean of its tokens' (B, dim), those outside `keep` left out."""
        x = self.encode(ids, keep=keep)
        if keep is None:
            return x.mean(1)
        weights = keep.to(x.dtype).unsqueeze(-1)
        return (x * weights).sum(1) / weights.sum(1).clamp_min(1)

    def forward(self, ids: Tensor, segments: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        if self.output != "labels":
            return super().forward(ids, segments, keep)
        return self.head(self.encode(ids, segments, keep)[:, 0])
