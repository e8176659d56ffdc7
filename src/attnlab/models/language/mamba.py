"""Mamba and Mamba-2 language models: layers of selective state spaces, and nothing else."""

from __future__ import annotations

from typing import Any

from attnlab import cards
from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder

_V1, _V2 = dict(vocabulary=50280), dict(vocabulary=50288, mixer="mamba2")

# Parameter counts: of the authors' checkpoints (state-spaces/mamba-130m and so on), the tied head counted once.
SIZES = {
    "mamba_130m": Size(129_135_360, dict(_V1, dim=768, depth=24)),
    "mamba_370m": Size(371_516_416, dict(_V1, dim=1024, depth=48)),
    "mamba_790m": Size(793_204_224, dict(_V1, dim=1536, depth=48)),
    "mamba_1_4b": Size(1_372_178_432, dict(_V1, dim=2048, depth=48)),
    "mamba_2_8b": Size(2_768_345_600, dict(_V1, dim=2560, depth=64)),
    "mamba2_130m": Size(128_989_632, dict(_V2, dim=768, depth=24)),
    "mamba2_370m": Size(368_346_624, dict(_V2, dim=1024, depth=48)),
    "mamba2_780m": Size(780_161_280, dict(_V2, dim=1536, depth=48)),
    "mamba2_1_3b": Size(1_343_757_312, dict(_V2, dim=2048, depth=48)),
    "mamba2_2_7b": Size(2_702_599_680, dict(_V2, dim=2560, depth=64)),
}


@register(
    Card(
        name="mamba_lm",
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        paper="2312.00752",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | ANY_LENGTH | STREAMING,
        cost="N",
        state="layers",
        sample=dict(vocabulary=64, dim=32, depth=2, mixer="mamba2", states=8, head_dim=16),
        sizes=SIZES,
    )
)
class MambaLM(Decoder):
    """A language model whose layers are selective state spaces: `build("mamba_2_8b")`, or `build("mamba2_1_3b")`.

    x = x + mixer(RMSNorm x) in each layer, without feed-forwards; the memory of a text is one state per layer, however
    long it is. Logits, state and `generate` are the `Decoder`'s. Sources: arXiv 2312.00752, 2405.21060 (Mamba-2).

    Args:
        mixer: "mamba" or "mamba2"; `options` are its keywords.
        tied: the head shares the embedding's weights.
        length: the longest text allowed; None for no limit.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        depth: int,
        mixer: str = "mamba",
        norm_eps: float = 1e-5,
        tied: bool = True,
        length: int | None = None,
        **options: Any,
    ) -> None:
        if mixer not in ("mamba", "mamba2"):
            raise ValueError(f"mixer must be 'mamba' or 'mamba2', got {mixer!r}")
        super().__init__(
            vocabulary=vocabulary, dim=dim, depth=depth, heads=1, position="none", norm_eps=norm_eps, tied=tied,
            length=length, mixer=lambda layer: cards.build(mixer, dim, **options), mlp=lambda layer: None,
        )  # fmt: skip
