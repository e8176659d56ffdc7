"""How much of one task's circuit another task uses, and what happens when idle heads are made to do their part."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from attnlab.lens.edits.heads import LookAt, at_heads

Head = tuple[int, int]


def circuit_of(effects: Tensor, least: float) -> set[Head]:
    """The heads (layer, head) whose effect `(layers, heads)` is at least so large, either way."""
    return {(int(i), int(j)) for i, j in (effects.abs() >= least).nonzero()}


def top_heads(effects: Tensor, count: int) -> list[Head]:
    """The `count` heads (layer, head) with the largest effects `(layers, heads)`, either way, the largest first."""
    if not 1 <= count <= effects.numel():
        raise ValueError(f"count must lie in 1 to {effects.numel()}, got {count}")
    width = effects.shape[1]
    return [(int(i) // width, int(i) % width) for i in effects.abs().flatten().topk(count).indices]


def overlap(one: Collection[Head], other: Collection[Head], *, of: str = "one") -> float:
    """The share of heads that are in both circuits, of those in `one`, in the "other", or in the "union" of the two."""
    first, second = set(one), set(other)
    whole = {"one": first, "other": second, "union": first | second}
    if of not in whole:
        raise ValueError(f"of must be 'one', 'other' or 'union', got {of!r}")
    if not whole[of]:
        raise ValueError(f"there is no head in {of}: an overlap is a share of some")
    return len(first & second) / len(whole[of])


def overlap_by_role(
    one: Mapping[str, Collection[Head]], other: Mapping[str, Collection[Head]], *, of: str = "one"
) -> dict[str, float]:
    """`overlap` of the heads of each role ("mover", "inhibition", …), and of all of them under "all"."""
    roles = {
        role: overlap(one.get(role, ()), other.get(role, ()), of=of)
        for role in [*one, *(r for r in other if r not in one)]
        if _whole(one.get(role, ()), other.get(role, ()), of)
    }
    every = overlap(set().union(*map(set, one.values())), set().union(*map(set, other.values())), of=of)
    return {**roles, "all": every}


def make_inhibit(heads: Collection[Head], wrong: Tensor) -> list[LookAt]:
    """Edits by which `heads` look, from the last token, at the `wrong` ones alone, as those of another task would.

    A head that inhibits what it looks at then lowers these answers: the four heads of GPT-2 medium that are idle on
    Colored Objects, pointed at the wrong colours, repair its answers (arXiv 2310.08744). Evenly over all of them.

    Args:
        heads: the idle inhibition heads, and the negative mover, as pairs (layer, head).
        wrong: places of the tokens `(B, T)`, −1 for none, or bool `(B, N)`.
    """
    return at_heads(LookAt, heads, targets=wrong)


def in_list_accuracy(logits: Tensor, choices: Tensor, right: Tensor) -> float:
    """How often the likeliest of the in-list answers `choices (B, T)`, ids, −1 for none, is `right (B,)`."""
    last = logits[:, -1] if logits.dim() == 3 else logits
    scores = last.gather(1, choices.clamp_min(0)).masked_fill(choices < 0, -torch.inf)
    picked = choices.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    return (picked == right).double().mean().item()


def _whole(one: Collection[Head], other: Collection[Head], of: str) -> bool:
    return bool({"one": one, "other": other}.get(of, [*one, *other]))
