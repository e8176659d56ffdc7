"""From tokens' choices of experts to lists of tokens, one for each expert and sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """For each expert and sequence the places of its tokens, `(E, B, L)`, ascending; L is the longest list.

    `filled (E, B, L)` says which are tokens and which only fill up, None that all count. `taken` are the places that
    are read, the same ones but in a release that errs.
    """

    places: Tensor
    filled: Tensor | None
    taken: Tensor

    def flat(self, places: Tensor, tokens: int) -> Tensor:
        """Places as one list of indices into the `B·tokens` tokens of all sequences."""
        return (places + tokens * torch.arange(places.shape[1], device=places.device)[:, None]).flatten()


def lists_of(chosen: Tensor, *, last: bool = False) -> Lists:
    """The tokens that chose each expert, from `chosen (B, N, E)`, bool.

    Shorter lists are filled up behind their tokens, or before them if `last`, with tokens that did not choose.
    """
    chosen = chosen.permute(2, 0, 1)
    counts = chosen.sum(-1)[..., None]
    most = int(counts.max())
    if last:
        places = chosen.byte().argsort(dim=-1, stable=True)[..., chosen.shape[-1] - most :]
        filled = torch.arange(most - 1, -1, -1, device=chosen.device) < counts
    else:
        places = (~chosen).byte().argsort(dim=-1, stable=True)[..., :most]
        filled = torch.arange(most, device=chosen.device) < counts
    return Lists(places, filled, places)


def released_lists(route: Tensor, *, share: float | None = None, release_order: bool = False) -> Lists:
    """As Union of Experts' code does it, from `route (B, N, E)`: each list takes the L tokens of largest route.

    L is the most that any expert of any sequence was chosen by, so shorter lists take tokens that did not choose, and
    those count; or L is a `share` of all tokens, rounded down, and those of least route are left out. `release_order`
    reads tokens by falling route and writes them to ascending places.
    """
    route = route.detach().permute(2, 0, 1)
    most = int((route > 0).sum(-1).max()) if share is None else max(1, int(share * route.shape[-1]))
    taken = route.topk(most, -1).indices
    places = taken.sort(-1).values
    return Lists(places, None, taken if release_order else places)
