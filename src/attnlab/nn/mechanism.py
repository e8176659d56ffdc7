"""What every mechanism shares: the contract of a token mixer, and the checks that give clear errors."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnlab.nn.cache import Owner
from attnlab.patterns import Causal, Pattern
from attnlab.positions import Position


class Mechanism(nn.Module):
    """A token mechanism: `(B, N, C)` to the same shape.

    Called as `m(x, context=None, *, grid=None, pattern=None, state=None)`; with a `state` (from `initial_state`, or
    from the call before) it returns `(y, state)`, and pieces give what the full causal pass gives.
    """

    causal_only: ClassVar[str] = ""  # why it cannot see what comes later, where it cannot
    _known: Owner = ()  # of the last state that was found to be its own

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if self.causal_only and not causal:
            raise ValueError(f"causal must be True: {type(self).__name__} is causal only, {self.causal_only}")
        self.dim = dim
        self.causal = causal

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first token, for streaming."""
        raise ValueError(f"{type(self).__name__} does not stream: it has no state")

    def owner(self, batch: int) -> Owner:
        """What a state is stamped with: class, batch, and each setting that is a whole number, a word or a pattern."""
        settings = (
            (name, value)
            for name, value in vars(self).items()
            if isinstance(value, (int, str, tuple, Pattern)) and name[0] != "_" and name != "training"
        )
        return (("", type(self).__name__), ("batch", batch), *settings)

    def check_state(self, state: Any, kind: type[Any], batch: int) -> None:
        """Raise unless `state` is a `kind` that began with a mechanism like this one, for so many sequences.

        One that was made by hand, without an owner, has nothing but its shapes to be checked by.
        """
        if not isinstance(state, kind):
            raise TypeError(
                f"state must be what {type(self).__name__}.initial_state gives, a {kind.__name__}, "
                f"got {type(state).__name__}"
            )
        if not state.owner or torch.compiler.is_compiling():
            return
        # Who goes on with a state is not asked for every setting at every token.
        if state.owner is self._known and state.owner[1] == ("batch", batch):
            return
        if state.owner != (mine := self.owner(batch)):
            raise ValueError(f"state belongs to another model or batch: {difference(state.owner, mine)}")
        self._known = state.owner

    def check(self, x: Tensor, context: Tensor | None = None) -> None:
        """Raise unless `x` is `(B, N, dim)` and `context`, if any, `(B, M, dim)`, both non-empty."""
        for name, tokens in (("x", x), ("context", context)):
            if tokens is None:
                continue
            if tokens.dim() != 3 or tokens.shape[-1] != self.dim:
                raise ValueError(f"{name} must have shape (B, N, {self.dim}), got {tuple(tokens.shape)}")
            if 0 in tokens.shape:
                raise ValueError(f"{name} must not be empty, got {tuple(tokens.shape)}")
        if context is not None and context.shape[0] != x.shape[0]:
            raise ValueError(f"context must have x's batch size {x.shape[0]}, got {context.shape[0]}")

    def refuse(self, **given: object) -> None:
        """Raise for any of the given arguments that is not None: this mechanism has no meaning for them."""
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{type(self).__name__} takes no {name}, got {type(value).__name__}")


class OnGrid(Mechanism):
    """A mechanism among all tokens of a grid of two axes: `over_grid(x, (height, width))` is all that it does.

    A mix-in before a base with weights of its own, or a base by itself. It has no context, pattern or state.
    """

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        pattern: Any = None,
        state: Any = None,
    ) -> Tensor:
        """`(B, H·W, C)` on `grid` (H, W), row by row, to the same."""
        self.check(x)
        self.refuse(context=context, pattern=pattern, state=state)
        height, width = check_grid(grid, x.shape[1], axes=2)
        return self.over_grid(x, (height, width))

    def over_grid(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The mechanism itself, of tokens that fit the grid."""
        raise NotImplementedError(f"{type(self).__name__} must say what it does on a grid")


def difference(theirs: Owner, ours: Owner) -> str:
    """In words, how the owner of a state differs from the mechanism that was given it."""
    if theirs[0] != ours[0]:
        return f"to {theirs[0][1]}, not to {ours[0][1]}"
    others = dict(theirs)
    return ", ".join(f"{name} = {others.get(name)}, not {own}" for name, own in ours if others.get(name) != own)


def check_heads(dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None) -> tuple[int, int]:
    """(kv_heads, head_dim) with their defaults filled in; ValueError where the numbers do not divide."""
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads = {heads}, got {kv_heads}")
    if head_dim is None:
        if dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads} (or give head_dim)")
        head_dim = dim // heads
    return kv_heads, head_dim


def check_turns(position: object) -> None:
    """Raise if `position` adds a bias to scores: there are none."""
    if isinstance(position, Position) and type(position).bias is not Position.bias:
        raise ValueError(f"position must turn q and k: there are no scores to bias, got {type(position).__name__}")


def check_keep(keep: Tensor, k: Tensor) -> Tensor:
    """`keep` `(B, M)`, False where a token is padding, as `(B, 1, M, 1)`, which fits keys `(B, H, M, D)`."""
    if keep.dtype != torch.bool or keep.shape != (len(k), k.shape[2]):
        wanted = (len(k), k.shape[2])
        raise ValueError(f"keep must be bool {wanted}, one for each key, got {keep.dtype} {tuple(keep.shape)}")
    return keep[:, None, :, None]


def check_grid(
    grid: tuple[int, ...] | None, tokens: int, axes: int | None = None, *, begin: int | None = None
) -> tuple[int, ...]:
    """`grid` as a tuple whose product is `tokens`; ValueError if it is missing or does not fit.

    With `begin`, the tokens are a part of it, from that place on.
    """
    if grid is None:
        raise ValueError(f"grid must be given, such as grid=(H, W) with H·W = {tokens}: it is never guessed")
    grid = tuple(int(g) for g in grid)
    if axes is not None and len(grid) != axes:
        raise ValueError(f"grid must have {axes} axes, got {grid}")
    if begin is not None:
        if begin + tokens > math.prod(grid):
            raise ValueError(f"grid must hold the {begin + tokens} tokens of state and x, got {grid}")
    elif math.prod(grid) != tokens:
        raise ValueError(f"grid must multiply to the number of tokens {tokens}, got {grid}")
    return grid


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, H·D)` to `(B, H, N, D)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """`(B, H, N, D)` to `(B, N, H·D)`."""
    return x.transpose(1, 2).flatten(2)


def pattern_for(
    causal: bool, pattern: Pattern | None, offset: int, queries: int | None = None, *, own: Pattern | None = None
) -> Pattern | None:
    """The pattern of one call: what the caller gave, narrowed to the mechanism's `own`, seen from position `offset`.

    `own` is everything, or what is causal, if None. With `queries=1` and nothing given the result is None: the token
    that comes last may see every key so far.
    """
    if pattern is not None and not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern, got {type(pattern).__name__} (wrap a mask: Explicit(mask))")
    if own is None and causal:
        if pattern is None and queries == 1 and offset > 0:
            return None
        own = Causal()
    if own is not None:
        pattern = own if pattern is None else pattern & own
    return None if pattern is None else pattern.starting_at(offset)
