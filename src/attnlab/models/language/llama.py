"""Llama: the decoder skeleton at the sizes of Meta's models, and of those built like them."""

from __future__ import annotations

from typing import Any

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder
from attnlab.positions import Llama3

_LLAMA3 = dict(vocabulary=128256, rope_base=500000.0)

# Parameter counts: of the released checkpoints, as Hugging Face's pages give them.
SIZES = {
    "llama_2_7b": Size(6_738_415_616, dict(vocabulary=32000, dim=4096, depth=32, heads=32, hidden=11008, length=4096)),
    "llama_2_13b": Size(
        13_015_864_320, dict(vocabulary=32000, dim=5120, depth=40, heads=40, hidden=13824, length=4096)
    ),
    "llama_3_8b": Size(
        8_030_261_248, dict(_LLAMA3, dim=4096, depth=32, heads=32, kv_heads=8, hidden=14336, length=8192)
    ),
    "llama_3_2_1b": Size(
        1_235_814_400,
        dict(_LLAMA3, dim=2048, depth=16, heads=32, kv_heads=8, hidden=8192, tied=True, length=131072,
             rope_scaling=Llama3(32.0)),
    ),
    "llama_3_2_3b": Size(
        3_212_749_824,
        dict(_LLAMA3, dim=3072, depth=28, heads=24, kv_heads=8, hidden=8192, tied=True, length=131072,
             rope_scaling=Llama3(32.0)),
    ),
    "tinyllama_1b": Size(
        1_100_048_384, dict(vocabulary=32000, dim=2048, depth=22, heads=32, kv_heads=4, hidden=5632, length=2048)
    ),
}  # fmt: skip


@register(
    Card(
        name="llama",
        title="LLaMA: Open and Efficient Foundation Language Models",
        paper="2302.13971",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | ANY_LENGTH | STREAMING,
        cost="N²",
        growth=None,
        state="layers",
        sample=dict(vocabulary=64, dim=32, depth=2, heads=4, kv_heads=2, hidden=64),
        sizes=SIZES,
    )
)
def llama(**keywords: Any) -> Decoder:
    """A Llama-shaped language model: `build("llama_3_2_1b")`, or `build("llama", vocabulary=…, dim=…, depth=…)`.

    Takes the keywords of `Decoder`; among them `mixer`, which puts another mechanism into every layer, or a list that
    puts one into each. Sources: arXiv 2302.13971, 2307.09288 (2), 2407.21783 (3).
    """
    return Decoder(**keywords)
