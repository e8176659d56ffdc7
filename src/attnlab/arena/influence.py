"""Who sees whom, measured: a picture of any mechanism, whatever it is made of."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import torch
from torch import Tensor, nn

from attnlab import cards
from attnlab.arena.network import mixer
from attnlab.arena.task import CAUSAL, GRID

_SHADES = " ░▒▓█"


def layout_of(card: cards.Card) -> str:
    """The layout in which a mechanism shows best: causal where it can be, a grid where it must."""
    on_sequences = card.claims(cards.ANY_LENGTH) or not card.claims(cards.ANY_GRID)
    causal = card.claims(cards.CAUSAL_SELF) or bool(getattr(cards.target(card.name), "causal_only", ""))
    return CAUSAL if causal and on_sequences else GRID


def influence(mechanism: str, layout: str = "", *, length: int = 64, width: int = 64) -> Tensor:
    """How strongly token j moves output i of the untrained mechanism, from gradients at random tokens: (N, N).

        influence[i, j] = ‖∂(w · y_i) / ∂x_j‖ / the largest of the row, so in [0, 1]; w random

    It needs nothing but the mechanism's forward: patterns, routes, states and convolutions all show. Parameters that
    start at zero are given small random numbers first.
    """
    layout = layout or layout_of(cards.describe(mechanism))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = mixer(mechanism, width, layout).eval()
        _stir(module)
        grid = _grid(module, length, width) if layout == GRID else None
        length = math.prod(grid) if grid else length
        # One copy of the sequence per query: a single backward pass then gives every row.
        copies = torch.randn(1, length, width).expand(length, -1, -1).clone().requires_grad_()
        outputs = module(copies, grid=grid)
        rows = torch.arange(length)
        (gradient,) = torch.autograd.grad((outputs[rows, rows] @ torch.randn(width)).sum(), copies)
    strength = gradient.norm(dim=-1).nan_to_num()
    return strength / strength.amax(1, keepdim=True).clamp_min(1e-30)


def _stir(module: nn.Module) -> None:
    """Small random numbers where norms and layers start at zero so as to be silent: here they shall show."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def _grid(module: nn.Module, length: int, width: int) -> tuple[int, ...]:
    """A grid of about `length` tokens that the mechanism takes: a square, a cube (frames, rows, columns), or a row as
    long as the one that it is bound to."""
    square, cube = (math.isqrt(length),) * 2, (round(length ** (1 / 3)),) * 3
    for grid in (square, cube):
        try:
            with torch.no_grad():
                module(torch.zeros(1, math.prod(grid), width), grid=grid)
        except ValueError:
            continue
        return grid
    return (1, getattr(module, "tokens", length))


def as_text(strength: Tensor) -> str:
    """The picture in characters, queries downwards; each is a query and a key, darker for more, blank for none."""
    shown = strength.log10().div(4).add(1).clamp(0, 1)  # down to a ten-thousandth
    shown[strength > 1e-7] = shown[strength > 1e-7].clamp_min(1e-3)
    levels = torch.ceil(shown * (len(_SHADES) - 1)).long()
    return "\n".join("".join(_SHADES[level] for level in row) for row in levels[::2].tolist())


def as_png(strength: Tensor) -> str:
    """The picture as a data URI: a grey PNG, one pixel per query (down) and key (across)."""
    grey = (255 * (1 - strength.clamp(0, 1).sqrt())).to(torch.uint8)
    height, width = grey.shape
    rows = b"".join(b"\0" + bytes(row) for row in grey.tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
