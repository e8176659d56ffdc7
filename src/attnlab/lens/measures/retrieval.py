"""Which heads copy from far back: needle spans, retrieval scores, and the heads that they name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from attnlab.cards import LENS, Card, register

Head = tuple[int, int]  # layer and head


def find_needle(prompt: Sequence[int] | Tensor, needle: Sequence[int] | Tensor, share: float = 0.9) -> tuple[int, int]:
    """Where in a prompt's ids a needle's stand: the first window of its length that has more than `share` of its ids.

    As a set, not in order, since tokens at its ends may melt into their neighbours'. (−1, −1) if there is none; the end
    may lie past the prompt's, where windows are shorter. Source: arXiv 2404.15574.
    """
    ids, wanted = _listed(prompt), set(_listed(needle))
    if not wanted:
        raise ValueError("needle must hold a token or more")
    size = len(_listed(needle))
    for i in range(len(ids)):
        if len(wanted.intersection(ids[i : i + size])) / len(wanted) > share:
            return i, i + size
    return -1, -1


@register(
    Card(
        name="retrieval_score",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        paper="2404.15574",
        system="retrieval_head",
        family="lens",
        kind=LENS,
        cost="N per written token",
    )
)
def retrieval_scores(
    rows: Iterable[Tensor], written: Sequence[int] | Tensor, prompt: Sequence[int] | Tensor, span: tuple[int, int],
    *, top: int = 1,
) -> Tensor:  # fmt: skip
    """How much of a needle each head copied while it was written out: `(L, H)`, in float64.

        score_lh = 1/|needle| · #{steps whose most watched key lies in the needle and holds the token written there}

    Args:
        rows: of each step, the weights `(L, H, keys)` of the token that was fed; what it predicted is what counts, so a
            head scores by looking at what comes next, and not at what is there already.
        written: the token that was predicted at each step.
        prompt: the prompt's ids; keys beyond them are written tokens.
        span: of the needle, from `find_needle`; (−1, −1) scores nothing.
        top: how many of the most watched keys are looked at; a step scores once at most. Of keys watched alike, those
            that `torch.topk` takes.

    A head that copies every token of the needle in turn scores 1, and more only if the needle is written repeatedly.
    Source: arXiv 2404.15574.
    """
    ids, tokens = torch.as_tensor(_listed(prompt)), _listed(written)
    start, end = span
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    scores: Tensor | None = None
    steps = 0
    for row, token in zip(rows, tokens, strict=False):
        if row.dim() != 3 or row.shape[-1] < top:
            raise ValueError(f"rows must be (layers, heads, keys) of {top} keys or more, got {tuple(row.shape)}")
        if scores is None:
            scores = torch.zeros(row.shape[:2], dtype=torch.float64)
        best = row.topk(top).indices.cpu()
        here = (best >= start) & (best < min(end, len(ids)))
        scores += (here & (ids[best.clamp_max(len(ids) - 1)] == token)).any(-1).double() / max(end - start, 1)
        steps += 1
    if scores is None or steps != len(tokens):
        raise ValueError(f"rows must be there for each of the {len(tokens)} written tokens, got {steps}")
    return scores


@dataclass
class HeadScores:
    """Retrieval scores of all heads, one `(L, H)` table per accepted trial."""

    tables: list[Tensor] = field(default_factory=list)

    def add(self, table: Tensor) -> None:
        if table.dim() != 2 or (self.tables and table.shape != self.tables[0].shape):
            raise ValueError(f"table must be (layers, heads), as the others are, got {tuple(table.shape)}")
        self.tables.append(table.detach().cpu().double())

    def mean(self) -> Tensor:
        """`(L, H)`: means over the accepted trials."""
        if not self.tables:
            raise ValueError("no trial was accepted: the model found no needle, and its heads cannot be judged")
        return torch.stack(self.tables).mean(0)

    def retrieval(self, least: float = 0.1) -> list[Head]:
        """The retrieval heads: those that score `least` on average (the paper's 0.1), best first."""
        mean = self.mean()
        return [(layer, head) for layer, head in self.ranked() if mean[layer, head] >= least]

    def ranked(self) -> list[Head]:
        """All heads, best first; of equal ones the earlier."""
        mean = self.mean()
        order = mean.flatten().argsort(descending=True, stable=True).tolist()
        return [(i // mean.shape[1], i % mean.shape[1]) for i in order]

    def best(self, count: int) -> list[Head]:
        """The `count` best heads: what the masking test takes away."""
        return self._some(self.ranked(), count)

    def others(self, count: int, *, outside: int = 100, generator: torch.Generator | None = None) -> list[Head]:
        """`count` heads at random outside the `outside` best: what the masking test takes away instead."""
        rest = self.ranked()[outside:]
        if count > len(rest):
            raise ValueError(f"count must be at most the {len(rest)} heads outside the {outside} best, got {count}")
        return [rest[i] for i in torch.randperm(len(rest), generator=generator)[:count].tolist()]

    def _some(self, heads: list[Head], count: int) -> list[Head]:
        if not 0 <= count <= len(heads):
            raise ValueError(f"count must lie in 0 to {len(heads)}, got {count}")
        return heads[:count]

    def save(self, path: str | Path) -> None:
        """As the authors' files: {"layer-head": [its score in each trial]}."""
        stacked = torch.stack(self.tables) if self.tables else torch.zeros(0, 0, 0)
        layers, heads = stacked.shape[1:]
        Path(path).write_text(
            json.dumps({f"{i}-{j}": stacked[:, i, j].tolist() for i in range(layers) for j in range(heads)})
        )

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """The scores of a file of the authors' kind."""
        try:
            found = {
                tuple(map(int, name.split("-"))): scores for name, scores in json.loads(Path(path).read_text()).items()
            }
            layers, heads = (1 + max(place[axis] for place in found) for axis in (0, 1))
            table = torch.tensor([[found[i, j] for j in range(heads)] for i in range(layers)], dtype=torch.float64)
        except (ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise ValueError(f'{path} holds no table of scores {{"layer-head": [scores]}}: {error}') from error
        return cls(list(table.permute(2, 0, 1)))


def _listed(ids: Sequence[int] | Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
