"""Is a task's sequence long for a transformer of a given width? MambaOut's criterion of when a state space may help."""

from __future__ import annotations

from typing import NamedTuple


class Length(NamedTuple):
    """How long `tokens` are for a transformer block of `dim` channels."""

    tokens: int
    dim: int
    threshold: int  # tokens beyond which the sequence counts as long
    ratio: float  # of the block's multiplications quadratic in the tokens to those linear in them
    long: bool


def long_sequence(tokens: int, dim: int) -> Length:
    """Whether so many tokens are a long sequence: where a block's quadratic part costs more than its linear part.

        FLOPs = 24 C² L + 4 C L²,  ratio = L / 6C,  long if L > 6C             L tokens, C channels, an MLP of 4C

    The paper's hypothesis is that state spaces pay on tasks that are long in this sense, or autoregressive: 196 tokens
    of an image are not, for any common width; the four thousand of a detector are, at 384 channels. Source: arXiv
    2405.07992, section 3.
    """
    for name, value in (("tokens", tokens), ("dim", dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    threshold = 6 * dim
    return Length(tokens, dim, threshold, tokens / threshold, tokens > threshold)
