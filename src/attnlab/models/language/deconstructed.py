"""Deconstructing Attention: language models in which attention lacks one of its properties, in all layers or some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder, DecoderState, SwiGLU
from attnlab.nn.linear.running_mean import RunningMean
from attnlab.nn.linear.taylor import TaylorAttention
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.borrowed import BorrowedMaps
from attnlab.positions import Rotary

Variant = Literal["mlp", "approximate", "non_approximate", "random_maps", "fixed_maps", "static_maps"]
VARIANTS = ("mlp", "approximate", "non_approximate", "random_maps", "fixed_maps", "static_maps")

# Which layers, counted from 1, have standard attention: layer, depth → whether.
LAYOUTS: dict[str, Callable[[int, int], bool]] = {
    "uniform": lambda layer, depth: False,
    "hybrid": lambda layer, depth: layer % 2 == 0,
    "odd": lambda layer, depth: layer % 2 == 1,
    "quarter": lambda layer, depth: layer % 4 == 0,
    "top": lambda layer, depth: layer <= depth // 2,
    "middle": lambda layer, depth: layer <= depth // 4 or layer > depth - depth // 4,
    "bottom": lambda layer, depth: layer > depth // 2,
    "first": lambda layer, depth: layer == 1,
    "last": lambda layer, depth: layer == depth,
    "bilateral": lambda layer, depth: layer in (1, depth),
}


def _size(params: int, dim: int, hidden: int, depth: int, heads: int, **more: Any) -> Size:
    return Size(params, dict(vocabulary=50304, dim=dim, hidden=hidden, depth=depth, heads=heads, **more))


# Widths and depths are the paper's; the counts, which it rounds, are those with an untied head and no biases.
SIZES = {
    "deconstructed_70m": _size(76_683_776, 512, 2048, 6, 8),
    "deconstructed_160m": _size(190_532_352, 768, 3072, 12, 12),
    "deconstructed_500m": _size(481_045_376, 896, 4864, 24, 14),
    "deconstructed_1.7b": _size(1_732_895_744, 2048, 6144, 28, 16, qk_norm=True),
}


class NoMixing(nn.Module):
    """A feed-forward layer in attention's place, with attention's 4·C² parameters and no look at other tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = SwiGLU(dim, round(4 * dim / 3))

    def initial_state(self, batch: int, **_: Any) -> tuple[()]:
        return ()

    def forward(self, x: Tensor, *, state: tuple[()] | None = None) -> Any:
        y = self.inner(x)
        return y if state is None else (y, state)


@register(
    Card(
        name="deconstructed",
        title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        paper="2510.11602",
        system="deconstruct_attn",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | STREAMING | ANY_LENGTH,
        cost="N², or N in layers that are mlp, approximate or non_approximate",
        state="layers + (0 if beside is None else len(blocks) * length * dim)",
        sample=dict(vocabulary=40, dim=24, depth=4, heads=2, variant="random_maps", layout="hybrid", length=64),
        sizes=SIZES,
    )
)
class Deconstructed(Decoder):
    """A decoder whose mixers each lack one property of attention, all with its 4·C² parameters.

    | variant         | lacks                  | mixer                                                          |
    |-----------------|------------------------|----------------------------------------------------------------|
    | mlp             | mixing of tokens       | SwiGLU of width 4C/3                                           |
    | approximate     | the exponential        | `taylor`                                                       |
    | non_approximate | pairwise scores        | `running_mean`                                                 |
    | random_maps     | dependence on the text | maps of a fixed random sequence that runs beside the text      |
    | fixed_maps      | dependence on the text | maps of a fixed text that runs beside the text                 |
    | static_maps     | queries of the layer   | maps of the text's own embeddings, in every layer              |

    The sequence beside the text passes through the same layers with the same weights, and gradients flow through it;
    each layer mixes the text's values by that sequence's queries and keys. Static maps see the embeddings through the
    layer's norm (the paper does not say). Rotary positions wherever queries meet keys.

    `layout="hybrid"` has the variant in layers 1, 3, 5, … (counted from 1) and standard attention between: nearly as
    good as attention everywhere, even where the variant alone fails. `skip()` leaves the variant's layers out.
    `LAYOUTS` has the paper's other ones: standard attention in odd layers, in every fourth, at one or both ends; the
    variant in the upper half ("top"), the middle or the lower half ("bottom").
    Source: arXiv 2510.11602.

    Args:
        variant: one of the table's, or None for standard attention.
        layout: one of `LAYOUTS`; "uniform" has the variant in every layer.
        length: the longest text; also the length of the sequence beside it.
        fixed: for fixed_maps, the ids of the fixed text, at least `length` of them.
        form, floor: of the approximate variant, as for `TaylorAttention`.
        sigma, seed: of the random sequence.
        qk_norm: norm queries and keys per head, as the paper's largest models do: "non_approximate" then trains alone.
        Others as for `Decoder`.
    """

    def __init__(
        self,
        *,
        variant: Variant | None = "random_maps",
        layout: str = "uniform",
        length: int = 2048,
        fixed: Sequence[int] | None = None,
        form: Literal["paper", "taylor"] = "paper",
        floor: float = 0.5,
        sigma: float = 1.0,
        seed: int = 0,
        qk_norm: bool = False,
        dim: int,
        depth: int,
        heads: int = 8,
        rope_base: float = 10000.0,
        **keywords: Any,
    ) -> None:
        if variant is not None and variant not in VARIANTS:
            raise ValueError(f"variant must be None or one of {', '.join(VARIANTS)}, got {variant!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        position = Rotary(dim // heads, base=rope_base)

        options: dict[str, Any] = dict(heads=heads, causal=True, qk_norm=nn.RMSNorm if qk_norm else None)
        relaxed = [not LAYOUTS[layout](layer, depth) for layer in range(1, depth + 1)]

        def build(layer: int) -> nn.Module:
            kind = variant if relaxed[layer] else None
            if kind == "mlp":
                return NoMixing(dim)
            if kind == "approximate":
                return TaylorAttention(dim, form=form, floor=floor, position=position, **options)
            if kind == "non_approximate":
                return RunningMean(dim, **options)
            return (MultiHead if kind is None else BorrowedMaps)(dim, position=position, **options)

        super().__init__(dim=dim, depth=depth, heads=heads, mixer=build, length=length, position="none", **keywords)
        self.variant, self.layout = variant, layout
        self.relaxed = tuple(i for i in range(depth) if relaxed[i] and variant is not None)
        self.left_out: tuple[int, ...] = ()
        self.beside: Tensor | None
        if variant == "random_maps":
            generator = torch.Generator().manual_seed(seed)
            beside = sigma * torch.randn(1, length, dim, generator=generator, device="cpu")
            beside = beside.to(self.embedding.weight.device)
        elif variant == "fixed_maps":
            if fixed is None or len(fixed) < length:
                raise ValueError(
                    f"fixed must hold at least length = {length} ids, got {0 if fixed is None else len(fixed)}"
                )
            beside = torch.tensor(list(fixed)[:length]).view(1, -1)
        else:
            beside = None
        self.register_buffer("beside", beside)

    def skip(self) -> Deconstructed:
        """Leave the variant's layers of a hybrid out from now on, mixer and feed-forward alike; returns the model."""
        if len(self.relaxed) == len(self.blocks):
            raise ValueError(f"skip needs a layout with standard layers, got {self.layout!r}: nothing would be left")
        self.left_out = self.relaxed
        return self

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecoderState:
        """As of `Decoder`, with the sequence beside the text carried through all layers once."""
        state = super().initial_state(batch, device=device, dtype=dtype)
        if self.beside is not None:
            with torch.no_grad():
                state.layers.append(self._beside(self.beside.shape[1]))
        return state

    def _beside(self, length: int) -> list[Tensor]:
        """The inputs (1, length, C) of every layer's mixer, of the sequence that runs beside the text."""
        if self.beside is None:
            return []
        piece = self.beside[:, :length]
        x = piece if piece.is_floating_point() else self.embedding(piece)
        seen = []
        block: Any
        for i, block in enumerate(self.blocks):
            if i not in self.left_out:
                seen.append(block.norm1(x))
                x = block(x)
            else:
                seen.append(x)
        return seen

    def forward(self, ids: Tensor, state: DecoderState | None = None, *, last: bool = False) -> Any:
        offset = self._check(ids, state)
        n = ids.shape[1]
        x = embedded = self.embedding(ids)
        others: list[Tensor] = []
        if self.beside is not None:
            others = self._beside(n) if state is None else [s[:, offset : offset + n] for s in state.layers[-1]]
        block: Any
        for i, block in enumerate(self.blocks):
            if i in self.left_out:
                continue
            maps = None
            if isinstance(block.mixer, BorrowedMaps):
                maps = block.norm1(embedded) if self.variant == "static_maps" else others[i]
            context = {} if maps is None else {"context": maps}
            if state is None:
                y = block.mixer(block.norm1(x), **context)
            else:
                y, state.layers[i] = block.mixer(block.norm1(x), state=state.layers[i], **context)
            x = x + y
            x = x + block.mlp(block.norm2(x))
        if state is not None:
            state.length += n
        logits = self.head(self.norm(x[:, -1:] if last else x))
        return logits if state is None else (logits, state)
