"""Titans language models: a decoder with a neural memory beside, before or instead of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder

_MIXERS = {"lmm": "neural_memory", "mac": "titans_mac", "mag": "titans_mag", "mal": "titans_mal"}
_PAPER: dict[str, Any] = dict(vocabulary=32000, tied=True)

# The paper gives its sizes as rounded counts alone: depths, widths and heads are ours, chosen to meet them with
# Llama-2's vocabulary. The counts are those of the memory as gate, and as context.
SIZES = {
    "titans_170m": Size(169_011_120, dict(_PAPER, dim=768, depth=12, heads=12, hidden=2816)),
    "titans_340m": Size(338_250_944, dict(_PAPER, dim=1024, depth=20, heads=16, hidden=1792)),
    "titans_400m": Size(399_347_328, dict(_PAPER, dim=1024, depth=24, heads=16, hidden=1792)),
    "titans_760m": Size(761_737_376, dict(_PAPER, dim=1536, depth=20, heads=24, hidden=3008)),
}


@register(
    Card(
        name="titans",
        title="Titans: Learning to Memorize at Test Time",
        paper="2501.00663",
        system="titans",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | ANY_LENGTH | STREAMING,
        cost="N w",
        state="layers",
        sample=dict(vocabulary=64, dim=32, depth=2, heads=2, hidden=64, options=dict(window=5, memory=dict(chunk=6))),
        sizes=SIZES,
    )
)
class Titans(Decoder):
    """A language model that learns its text by heart while it reads: `build("titans_340m")`, `variant="mac"` and so on.

    x = x + mixer(RMSNorm x), x = x + SwiGLU(RMSNorm x) in each layer. Logits, state and `generate` are the `Decoder`'s.
    Source: arXiv 2501.00663.

    Args:
        variant: "mac", the memory as context (`MemoryAsContext`); "mag", as gate; "mal", as layer; "lmm", it alone.
        options: keywords for the mixer.
        position: of the attention, as for `Decoder`.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int = 8,
        hidden: int | None = None,
        variant: str = "mag",
        options: Mapping[str, Any] | None = None,
        position: str = "rotary",
        length: int | None = None,
        tied: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        if variant not in _MIXERS:
            raise ValueError(f"variant must be one of {', '.join(_MIXERS)}, got {variant!r}")
        super().__init__(
            vocabulary=vocabulary, dim=dim, depth=depth, heads=heads, hidden=hidden, mixer=_MIXERS[variant],
            mixer_options=options, position=position, length=length, tied=tied, norm_eps=norm_eps,
        )  # fmt: skip
