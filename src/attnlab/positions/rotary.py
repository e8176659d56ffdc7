"""Rotary embeddings: pairs of channels turn with the position, so a score depends on the distance alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.positions.base import Position


@dataclass(frozen=True)
class Scaling:
    """A way to stretch trained rotations over longer texts: other frequencies, and a factor on q and k."""

    factor: float

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise ValueError(f"{type(self).__name__}: factor must be at least 1, got {self.factor}")

    def frequencies(self, dim: int, base: float) -> Tensor:
        """Angle per position of each of the dim/2 pairs, in float64."""
        raise NotImplementedError

    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation: all angles divided by `factor` (arXiv 2306.15595)."""

    def frequencies(self, dim: int, base: float) -> Tensor:
        return _frequencies(dim, base) / self.factor


@dataclass(frozen=True)
class NTK(Scaling):
    """A larger base: the slowest pair is stretched by `factor`, the fastest not at all (NTK-aware, in 2309.00071)."""

    def frequencies(self, dim: int, base: float) -> Tensor:
        return _frequencies(dim, base * self.factor ** (dim / (dim - 2)) if dim > 2 else base)


@dataclass(frozen=True)
class YaRN(Scaling):
    """Interpolates pairs that turn less than `slow` times over the `trained` length, keeps those over `fast` times.

    Between, a ramp over the pair's index; q and k grow by 0.1 ln(factor) + 1. arXiv 2309.00071.
    """

    trained: int = 4096
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None

    def frequencies(self, dim: int, base: float) -> Tensor:
        def pair(turns: float) -> float:
            """The index at which a pair makes so many turns over the trained length."""
            return dim * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(pair(self.fast)), 0), min(math.ceil(pair(self.slow)), dim - 1)
        index = torch.arange(dim // 2, dtype=torch.float64)
        share = ((index - low) / (high - low if high != low else 1e-3)).clamp(0, 1)
        whole = _frequencies(dim, base)
        return share * whole / self.factor + (1 - share) * whole

    def magnitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.attention is None else self.attention


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's: wavelengths over trained/`low` are stretched, those under trained/`high` kept, a ramp between."""

    trained: int = 8192
    low: float = 1.0
    high: float = 4.0

    def frequencies(self, dim: int, base: float) -> Tensor:
        whole = _frequencies(dim, base)
        turns = self.trained * whole / (2 * math.pi)
        share = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - share) * whole / self.factor + share * whole


def _frequencies(dim: int, base: float) -> Tensor:
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the pairs of the last axis of `x (…, N, D)` by angles whose `cos`, `sin` are `(N, R/2)`; R ≤ D turn.

    Pairs are (i, i + R/2), or (2i, 2i + 1) if `interleaved`. Channels from R on stay.
    """
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        moving, still = x.split([turned, x.shape[-1] - turned], -1)
        return torch.cat((rotate(moving, cos, sin, interleaved=interleaved), still), -1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


class Rotary(Position):
    """Turns each pair of channels of q and k by position · frequency: q_i·k_j then depends on i − j.

        θ_p = base^(−2p/R)      (a, b) → (a cos nθ − b sin nθ, b cos nθ + a sin nθ) for pair p at position n

    q, k `(B, H, N, D)` → the same. Angles are computed in float64 and kept in a table that grows as needed.
    Source: arXiv 2104.09864.

    Args:
        head_dim: D, even unless `dim` is given.
        base: of the frequencies.
        dim: R, how many channels turn; the others keep no position (partial rotation). All if None.
        interleaved: pairs are neighbours (the paper, GPT-J), not halves (GPT-NeoX, Llama, transformers).
        scaling: for texts longer than those trained on: `Linear`, `NTK`, `YaRN`, `Llama3`.
        frequencies: R/2 angles per position, in place of `base` and `scaling`.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        dim: int | None = None,
        interleaved: bool = False,
        scaling: Scaling | None = None,
        frequencies: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        dim = head_dim if dim is None else dim
        if dim < 2 or dim % 2 or dim > head_dim:
            raise ValueError(f"dim must be even and between 2 and head_dim = {head_dim}, got {dim}")
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        if frequencies is not None and (len(frequencies) != dim // 2 or scaling is not None):
            raise ValueError(f"frequencies must be {dim // 2} numbers, without scaling; got {len(frequencies)}")
        self.head_dim, self.dim, self.base = head_dim, dim, base
        self.interleaved, self.scaling = interleaved, scaling
        self.magnitude = 1.0 if scaling is None else scaling.magnitude()
        with torch.device("cpu"):  # plain numbers even where a model is laid out on the meta device
            given = _frequencies(dim, base) if scaling is None else scaling.frequencies(dim, base)
            self._angles = given if frequencies is None else torch.tensor(frequencies, dtype=torch.float64)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self, q: Tensor, k: Tensor, offset: int = 0, *, grid: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        if q.shape[-2] != k.shape[-2] or q.dtype != k.dtype:
            return self.turn(q, offset), self.turn(k, offset)
        self._check(q, k)
        cos, sin = self.table(offset, offset + q.shape[-2], q)
        return (
            rotate(q, cos, sin, interleaved=self.interleaved),
            rotate(k, cos, sin, interleaved=self.interleaved),
        )

    def turn(self, x: Tensor, offset: int = 0) -> Tensor:
        """`x (…, N, D)`, of which the first token stands at position `offset`."""
        self._check(x)
        cos, sin = self.table(offset, offset + x.shape[-2], x)
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def _check(self, *heads: Tensor) -> None:
        for x in heads:
            if x.shape[-1] != self.head_dim:
                raise ValueError(f"x must have head dimension {self.head_dim}, got {x.shape[-1]}")

    def turn_to(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x (…, N, D)` with each token at the position that `positions (N)` or `(…, N)` gives."""
        cos, sin = self.cos_sin(positions, x)
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def cos_sin(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(…, R/2)` of the angles at `positions (…)`, in the dtype and on the device of `like`."""
        if positions.device.type == "mps":
            positions = positions.cpu()  # no float64 there
        angles = positions.to(torch.float64)[..., None] * self._angles.to(positions.device)
        return (self.magnitude * angles.cos()).to(like), (self.magnitude * angles.sin()).to(like)

    def table(self, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(stop − start, R/2)` of the positions from `start` to `stop`."""
        if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
            # A traced graph holds the formula; a table that outlives the trace would hold tensors without values.
            return self.cos_sin(torch.arange(start, stop, device=like.device), like)
        cos, sin = self._tables.get((like.device, like.dtype), (None, None))
        if cos is None or sin is None or len(cos) < stop:
            with torch.inference_mode(False), torch.no_grad():
                length = max(stop, 64 if cos is None else 2 * len(cos))
                cos, sin = self.cos_sin(torch.arange(length, device=like.device), torch.empty_like(like))
            self._tables[like.device, like.dtype] = cos, sin
        return cos[start:stop], sin[start:stop]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": {}}

    def extra_repr(self) -> str:
        return f"{self.dim} of {self.head_dim}, base={self.base:g}" + (f", {self.scaling}" if self.scaling else "")


class RotaryGrid(Position):
    """Rotary positions on a grid of any number of axes: each axis turns its own share of the channels.

    q, k `(B, H, N, D)` with `grid=(H, W)`, N = H·W in row-major order; the first D/2 channels turn with the row, the
    others with the column. `prefix` first tokens (a class token) do not turn. Sources: 2104.09864, 2403.13298 (axial).
    """

    on_grid = True

    def __init__(
        self, head_dim: int, *, axes: int = 2, base: float = 100.0, interleaved: bool = False, prefix: int = 0
    ) -> None:
        super().__init__()
        if axes < 1 or head_dim % (2 * axes):
            raise ValueError(f"head_dim must be a multiple of 2·axes = {2 * axes}, got {head_dim}")
        self.axes, self.prefix = axes, prefix
        self.axis = Rotary(head_dim // axes, base=base, interleaved=interleaved)

    def forward(
        self, q: Tensor, k: Tensor, offset: int = 0, *, grid: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        if offset:
            raise ValueError(f"offset must be 0: a grid comes whole, got {offset}")
        if grid is None or len(grid) != self.axes:
            raise ValueError(f"grid must have {self.axes} axes, got {grid}")
        return self.turn(q, tuple(grid)), self.turn(k, tuple(grid))

    def turn(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """`x (…, prefix + N, D)` on its grid."""
        if x.shape[-2] != self.prefix + math.prod(grid):
            raise ValueError(f"grid must multiply to {x.shape[-2] - self.prefix} tokens, got {grid}")
        fixed, places = x[..., : self.prefix, :], x[..., self.prefix :, :]
        shares = []
        for axis, (share, size) in enumerate(zip(places.chunk(self.axes, -1), grid, strict=True)):
            cos, sin = self.axis.table(0, size, x)
            after = math.prod(grid[axis + 1 :])
            spread = (t.repeat_interleave(after, 0).repeat(math.prod(grid[:axis]), 1) for t in (cos, sin))
            shares.append(rotate(share, *spread, interleaved=self.axis.interleaved))
        turned = torch.cat(shares, -1)
        return torch.cat((fixed, turned), -2) if self.prefix else turned
