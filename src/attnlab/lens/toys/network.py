"""The small decoder that all toys train, and how: attnlab's own skeleton, two layers, Adam, and examples that grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.multihead import MultiHead
from attnlab.positions import Rotary

NOT_ASKED = -100

# Prompts of one level of difficulty: ids (B, N), and what is to follow each of them: of the last token always, of the
# others where it is not NOT_ASKED.
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def small_decoder(
    vocabulary: int, *, dim: int = 64, heads: int = 4, depth: int = 2, hidden: int = 128, seed: int = 0,
    mixer: Callable[[int], nn.Module] | None = None,
) -> Decoder:  # fmt: skip
    """A decoder in which induction forms within 200 steps: `(B, N)` ids → `(B, N, vocabulary)` logits.

    Two choices make it quick. The first layer's rotation turns fast (base 3), so that "the token before" is soon found,
    and the other layers know no position, so that they match by content alone. And the embedding is large enough (0.3)
    to be seen beside what untrained attention writes. `mixer` builds the attention of a layer otherwise.
    """

    def usual(layer: int) -> MultiHead:
        return MultiHead(dim, heads=heads, causal=True, position=Rotary(dim // heads, base=3.0) if layer == 0 else None)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(
            vocabulary=vocabulary, dim=dim, depth=depth, heads=heads, hidden=hidden, mixer=mixer or usual
        )  # fmt: skip
        nn.init.normal_(model.embedding.weight, std=0.3)
    return model


def fit(
    model: nn.Module, draw: Draw, *, steps: int, levels: Sequence[int], seed: int = 0, learning_rate: float = 2e-3
) -> None:
    """Trains in place by AdamW on what `draw` gives, and leaves the model in eval mode.

    A level gives way to the next when nine of ten answers to the last token are right: with few things to choose
    between, the gradient finds the circuit at once; with many it first wanders on a plateau.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    level, recent = 0, 0.0
    model.train()
    for _ in range(steps):
        ids, targets = draw(levels[level], rng)
        logits = model(ids)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_ASKED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent = 0.8 * recent + 0.2 * (logits[:, -1].argmax(-1) == targets[:, -1]).double().mean().item()
        if recent > 0.9 and level + 1 < len(levels):
            level, recent = level + 1, 0.5
    model.eval()


@torch.no_grad()
def last_token_accuracy(model: nn.Module, ids: Tensor, answers: Tensor) -> float:
    """The share of prompts `ids (B, N)` after whose last token `answers (B,)` is the likeliest."""
    return (model(ids)[:, -1].argmax(-1) == answers).double().mean().item()
