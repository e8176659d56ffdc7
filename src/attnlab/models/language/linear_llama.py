"""Linear-Llama3: Llama 3's decoder with a state in attention's place, in all layers or in three of four."""

from __future__ import annotations

from typing import Any

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder

_1B = dict(vocabulary=128256, dim=2048, depth=16, heads=16, hidden=8192, rope_base=500000.0, tied=True)

# The paper gives the sizes in words (1B, 16 layers of 2048 channels); these are the counts that follow from them.
SIZES = {
    "linear_llama3_1b": Size(1_336_479_744, _1B),
    "linear_llama3_1b_hybrid": Size(1_336_479_232, dict(_1B, hybrid=4)),
    "linear_llama3_1b_gla": Size(1_337_561_088, dict(_1B, kind="gla")),
}


@register(
    Card(
        name="linear_llama",
        title="LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
        paper="2502.07563",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | ANY_LENGTH | STREAMING,
        cost="N",
        growth=None,
        state="layers",
        sample=dict(vocabulary=64, dim=32, depth=4, heads=4, hidden=64, hybrid=4),
        sizes=SIZES,
    )
)
def linear_llama(*, kind: str = "basic", hybrid: int | None = None, depth: int, **keywords: Any) -> Decoder:
    """A Llama-shaped language model whose layers keep a state: `build("linear_llama3_1b", kind="retention")`.

    Takes the keywords of `Decoder`, and a `kind` of `StateAttention`: basic, lightning, retention, gla, based, rebased.
    With `hybrid=4`, every fourth layer is softmax attention. Spread over ranks by `attnlab.scale.parallelize`
    (`method="allgather"` is LASP-2H). Source: arXiv 2502.07563.
    """
    if hybrid is not None and hybrid < 1:
        raise ValueError(f"hybrid must be at least 1, got {hybrid}")
    linear = ("state_attention", {"kind": kind})
    mixers = ["multihead" if hybrid and i % hybrid == hybrid - 1 else linear for i in range(depth)]
    return Decoder(depth=depth, mixer=mixers, **keywords)
