"""Chained recall: links `a · b`, in any order, with a filler in each, and then the chain from its first end.

Told "c · d, a · b, b · c", the model goes on from "a" with "b c d": each word that it writes is looked up next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.lens.toys.network import NOT_ASKED, fit, small_decoder
from attnlab.models.skeletons.decoder import Decoder

WORDS, FILLERS = 24, 8  # words are tokens 0 … 23, fillers 24 … 31
VOCABULARY = WORDS + FILLERS
LINKS = 8


def batch(size: int, *, links: int = LINKS, seed: int | torch.Generator = 0) -> Tensor:
    """`(size, 4·links + 1)`: `links` links of three tokens each, and the chain of links + 1 words."""
    if not 1 <= links < WORDS:
        raise ValueError(f"links must lie in 1 to {WORDS - 1}, got {links}")
    rng = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    chain = torch.rand(size, WORDS, generator=rng).argsort(1)[:, : links + 1]
    fillers = torch.randint(WORDS, VOCABULARY, (size, links), generator=rng)
    told = torch.stack((chain[:, :-1], fillers, chain[:, 1:]), -1)
    order = torch.rand(size, links, generator=rng).argsort(1)
    told = told.gather(1, order[..., None].expand(-1, -1, 3))
    return torch.cat((told.flatten(1), chain), 1)


def train(steps: int = 300, seed: int = 0, *, size: int = 48) -> Decoder:
    """A decoder of two layers that follows chains of 8 links: some 5 seconds on one core."""
    model = small_decoder(VOCABULARY, seed=seed)

    def draw(links: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = batch(size, links=links, seed=rng)
        targets = torch.full_like(ids[:, 1:], NOT_ASKED)
        targets[:, 3 * links :] = ids[:, 3 * links + 1 :]
        return ids[:, :-1], targets

    fit(model, draw, steps=steps, levels=range(2, LINKS + 1), seed=seed)
    return model


@torch.no_grad()
def accuracy(model: torch.nn.Module, ids: Tensor) -> float:
    """The share of the chain's words, after its first, that the model would have written."""
    start = 3 * (ids.shape[1] - 1) // 4
    return (model(ids[:, :-1])[:, start:].argmax(-1) == ids[:, start + 1 :]).double().mean().item()
