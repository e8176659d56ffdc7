"""The masks that models are trained with on long contexts, by name (LongCA-bench, arXiv 2510.17896)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attnlab.patterns.base import Pattern
from attnlab.patterns.sequence import Causal, Documents, Full, Sinks, Window
from attnlab.patterns.spans import BlockCausal, From, Rectangle, Rectangles, Starts

# Shares of documents by length, as long texts have them: (shortest, longest, weight).
DOCUMENTS = ((256, 1024, 0.5), (1024, 4096, 0.35), (4096, 16_384, 0.15))
LONG_DOCUMENTS = ((4096, 16_384, 0.6), (16_384, 65_536, 0.4))


@dataclass(frozen=True)
class Setting:
    """What the masks are made of: documents' lengths (their sum is the number of tokens), window, block, prefix.

    The authors' code counts generously, and so do these masks: a window of w holds w + 1 keys, a prefix of p holds
    p + 1, block-causal queries see one key past their block, and global tokens number 2 w.
    """

    lengths: tuple[int, ...]
    window: int = 1024
    block: int = 2048
    prefix: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(int(n) for n in self.lengths))
        Documents(self.lengths)
        for name in ("window", "block", "prefix"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def _documents(s: Setting) -> Pattern:
    return Documents(s.lengths)


STATIC: dict[str, Callable[[Setting], Pattern]] = {
    "full": lambda s: Full(),
    "causal": lambda s: Causal(),
    "sliding_window": lambda s: Window(s.window + 1, causal=False),
    "sliding_window_causal": lambda s: Window(s.window + 1),
    "full_document": _documents,
    "causal_document": lambda s: _documents(s) & Causal(),
    "block_causal": lambda s: BlockCausal(s.block, extra=1),
    "varlen_block_causal": lambda s: _documents(s) & BlockCausal(s.block, extra=1),
    "block_causal_document": lambda s: _documents(s) & BlockCausal(s.block),
    "prefix_lm_causal": lambda s: Causal() | Sinks(s.prefix + 1),
    "prefix_lm_document": lambda s: _documents(s) & (Causal() | Starts(s.lengths, s.prefix + 1)),
    # The first document is the question that all others answer.
    "share_question": lambda s: Causal() & (_documents(s) | Sinks(s.lengths[0])),
    # The last document reads all before it.
    "causal_blockwise": lambda s: Causal() & (_documents(s) | From(s.tokens - s.lengths[-1])),
    "global_sliding_window": lambda s: Window(s.window + 1, causal=False) | Sinks(2 * s.window) | ~From(2 * s.window),
}
# The four types of the range form.
SHAPES = {"full": "full", "causal": "causal", "invcausal": "inverse", "bicausal": "both"}


def mask(kind: str, setting: Setting) -> Pattern:
    """The static mask `kind` as a pattern.

    Raises:
        ValueError: an unknown kind; the message names those there are.
    """
    if kind not in STATIC:
        raise ValueError(f"mask must be one of {', '.join(STATIC)}, got {kind!r}")
    return STATIC[kind](setting)


def rectangle(kind: str, nq: int, nk: int) -> Pattern:
    """One rectangle of the range form: full, causal (aligned bottom right), invcausal (top left) or bicausal."""
    if kind not in SHAPES:
        raise ValueError(f"kind must be one of {', '.join(SHAPES)}, got {kind!r}")
    return Rectangles((Rectangle(0, nq, 0, nk, SHAPES[kind]),))  # type: ignore[arg-type]


def document_lengths(
    tokens: int, intervals: Sequence[tuple[int, int, float]] = DOCUMENTS, *, seed: int = 0
) -> tuple[int, ...]:
    """Documents' lengths that sum to `tokens`: an interval by its weight, a length evenly in it; the last is cut."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.tensor([weight for *_, weight in intervals])
    if tokens < 1 or not len(weights) or bool((weights <= 0).any()):
        raise ValueError(f"document_lengths needs tokens ≥ 1 and positive weights, got {tokens} and {intervals}")
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        low, high, _ = intervals[int(torch.multinomial(weights, 1, generator=rng))]
        lengths.append(min(int(torch.randint(low, high + 1, (), generator=rng)), left))
    return tuple(lengths)


def area(pattern: Pattern, nq: int, nk: int | None = None) -> int:
    """How many pairs a mask shows."""
    return round(pattern.density(nq, nk) * nq * (nq if nk is None else nk))


def flops(area: int, heads: int, head_dim: int, *, backward: bool = False) -> float:
    """The benchmark's count: 4 · area · heads · head_dim forward; backward 2.5 times as many more."""
    return 4.0 * area * heads * head_dim * (3.5 if backward else 1.0)
