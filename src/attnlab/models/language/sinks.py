"""The small Llamas in which attention sinks were studied, and every change to them that makes or breaks a sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from attnlab.cards import ANY_LENGTH, CAUSAL_SELF, LM, STREAMING, Card, Size, register
from attnlab.models.skeletons.decoder import Decoder, DecoderBlock, SwiGLU
from attnlab.models.skeletons.parts import MLP
from attnlab.patterns import Pattern, Prefix, Window
from attnlab.positions import BucketBias, Position, Rotary
from attnlab.positions.sinusoid import Sinusoid

GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": silu, "geglu": gelu, "reglu": relu}
PLAIN: dict[str, Callable[[], nn.Module]] = {"swish": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}


class GLU(SwiGLU):
    """`w2(f(w1 x) · w3 x)` with any function f (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor], *, bias: bool = False) -> None:
        super().__init__(dim, hidden, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class SinkBlock(DecoderBlock):
    """A decoder's block under a `pattern`, its norms before the branches or, with `post_norm`, after them."""

    def __init__(self, *parts: Any, pattern: Pattern | None, post_norm: bool, **keywords: Any) -> None:
        super().__init__(*parts, **keywords)
        self.pattern, self.post_norm = pattern, post_norm

    def forward(self, x: Tensor, *, state: Any = None) -> Any:
        inner: Mapping[str, Any] = {} if self.pattern is None else {"pattern": self.pattern}
        y = x if self.post_norm else self.norm1(x)
        if state is None:
            y = self.mixer(y, **inner)
        else:
            y, state = self.mixer(y, state=state, **inner)
        x = self.norm1(x + y) if self.post_norm else x + y
        if self.mlp is not None and self.norm2 is not None:
            x = self.norm2(x + self.mlp(x)) if self.post_norm else x + self.mlp(self.norm2(x))
        return x if state is None else (x, state)


class CoarseRotary(Rotary):
    """Rotary positions whose cosines and sines are rounded to bfloat16, as the authors' are in float32 too."""

    def cos_sin(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        rate = 1.0 / self.base ** (torch.arange(0, self.dim, 2, device=positions.device).float() / self.dim)
        angles = positions.float()[..., None] * rate
        return angles.cos().bfloat16().to(like), angles.sin().bfloat16().to(like)


class BucketNumber(BucketBias):
    """The number of T5's bucket itself as the bias, untrained: keys weigh more, the further they are away."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        del self.table
        self.register_buffer("table", torch.arange(self.count).float()[:, None].repeat(1, heads), persistent=False)


_BASE: dict[str, Any] = dict(vocabulary=50432, dim=768, depth=10, heads=8, hidden=1536, length=2048)
_1B: dict[str, Any] = dict(vocabulary=50432, dim=2048, depth=22, heads=16, hidden=5632, length=2048)
_PARAMS = 136_462_080  # 58,998,528 without embedding and head


def _sizes() -> dict[str, Size]:
    """The authors' configurations, by their names; counts are differences to the one that the paper starts from."""

    def mixer(name: str, **options: Any) -> dict[str, Any]:
        return dict(mixer=name, mixer_options=options)

    def bias(key: bool, value: bool, per_head: bool) -> dict[str, Any]:
        return mixer("kv_bias", key=key, value=value, per_head=per_head)

    changes: dict[str, tuple[int, dict[str, Any]]] = {
        "": (0, {}),
        **{f"_head{n}": (0, dict(heads=n)) for n in (1, 2, 4)},
        **{f"_{n}": (-11_796_480, dict(ffn=n)) for n in PLAIN},
        **{f"_{n}": (0, dict(ffn=n)) for n in ("geglu", "reglu")},
        "_nope": (0, dict(position="none")),
        "_absolute": (0, dict(position="sinusoid")),
        "_alibi": (0, dict(position="alibi")),
        "_relative": (0, dict(position="relative", variant="release")),
        "_learnable": (1_572_864, dict(position="learned")),
        "_post_norm": (-768, dict(post_norm=True)),
        "_kv_bias": (1_920, bias(True, True, False)),
        "_k_bias": (960, bias(True, False, False)),
        "_v_bias": (960, bias(False, True, False)),
        "_kv_head_bias": (15_360, bias(True, True, True)),
        "_k_head_bias": (7_680, bias(True, False, True)),
        "_v_head_bias": (7_680, bias(False, True, True)),
        **{f"_prefix{n}": (0, dict(prefix=n)) for n in (2, 3, 4, 5, 10)},
        **{f"_window{n}": (0, dict(window=n)) for n in (32, 64, 128, 256, 512, 1024)},
        **{
            f"_sim_{s}_{'norm' if n else 'no_norm'}": (0, mixer("similarity", similarity=s, normalise=n))
            for s in ("sigmoid", "elu")
            for n in (True, False)
        },
        **{
            f"_{k}_{'norm' if n else 'no_norm'}": (184_320 if k == "mlp" else 0, mixer("kernel", kernel=k, normalise=n))
            for k in ("elu", "linear", "mlp")
            for n in (True, False)
        },
    }
    sizes = {
        f"tinyllama_60m{name}": Size(_PARAMS + more, {**_BASE, **change}) for name, (more, change) in changes.items()
    }
    sizes["tinyllama_1m"] = Size(27_133_184, {**_BASE, "dim": 256, "depth": 2, "hidden": 512})
    sizes["tinyllama_1_1b"] = Size(1_337_026_560, _1B)
    sizes["tinyllama_1_1b_sim_sigmoid_no_norm"] = Size(1_337_026_560, {**_1B, **mixer("similarity")})
    return sizes


@register(
    Card(
        name="sink_lm",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        paper="2410.10781",
        system="attnsink",
        family="language",
        kind=LM,
        capabilities=CAUSAL_SELF | ANY_LENGTH | STREAMING,
        cost="N²",
        state="layers",
        sample=dict(vocabulary=64, dim=32, depth=2, heads=4, hidden=48, mixer="kv_bias", ffn="geglu", position="alibi"),
        sizes=_sizes(),
    )
)
class SinkLM(Decoder):
    """A small Llama with whatever may make or break an attention sink exchanged: `build("tinyllama_60m_k_bias")`.

        x = x + mixer(RMSNorm x)        x = x + ffn(RMSNorm x)        logits = head(RMSNorm x)

    Logits, state and `generate` are the `Decoder`'s, and so are the keywords not named here; `mixer` is where
    "kv_bias", "similarity" and "kernel" go. The authors train it by `SCHEDULE`. Source: arXiv 2410.10781
    (sail-sg/Attention-Sink).

    Args:
        ffn: "swiglu", "geglu" or "reglu", gated; "swish", "gelu" or "relu", not; or "none".
        position: of the `Decoder`, or "relative" (T5's learned buckets), or "sinusoid", added to the embeddings.
        window: each token sees so many, with itself; all before it if None.
        prefix: the first tokens that all see, and each other: a prefix language model. It has no state then, and
            generates with `cached=False`.
        bias: in all projections but the head.
        post_norm: x = RMSNorm(x + mixer(x)), x = RMSNorm(x + ffn(x)), and no last norm.
        variant: "release" has what differs in the authors' code: rotary cosines and sines rounded to bfloat16 whatever
            the dtype, and as the relative bias the bucket's own number, untrained, which favours what is far away.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        kv_heads: int | None = None,
        hidden: int | None = None,
        ffn: str = "swiglu",
        position: str | Position = "rotary",
        window: int | None = None,
        prefix: int = 0,
        post_norm: bool = False,
        bias: bool = False,
        variant: Literal["paper", "release"] = "paper",
        mixer_options: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        if ffn not in (known := [*GATED, *PLAIN, "none"]):
            raise ValueError(f"ffn must be one of {', '.join(known)}, got {ffn!r}")
        if variant not in ("paper", "release"):
            raise ValueError(f"variant must be 'paper' or 'release', got {variant!r}")
        if window is not None and prefix:
            raise ValueError(f"window and prefix exclude each other, got {window} and {prefix}")
        width = 2 * dim if hidden is None else hidden
        place: str | Position = "none" if position == "sinusoid" else position
        if position == "relative":
            place = BucketNumber(heads) if variant == "release" else BucketBias(heads)
        elif position == "rotary" and variant == "release":
            place = CoarseRotary(keywords.get("head_dim") or dim // heads, base=keywords.get("rope_base", 10000.0))
        pattern: Pattern | None = Window(window) if window is not None else Prefix(prefix) if prefix else None

        def mlp(_: int) -> nn.Module | None:
            if ffn == "none":
                return None
            if ffn in GATED:
                return GLU(dim, width, GATED[ffn], bias=bias)
            return MLP(dim, width, activation=PLAIN[ffn], bias=bias)

        options = {"bias": bias, **(mixer_options or {}), **({"causal": False} if prefix else {})}
        super().__init__(
            dim=dim, depth=depth, heads=heads, kv_heads=kv_heads, position=place, mlp=mlp, mixer_options=options,
            **keywords,
        )  # fmt: skip
        norm_eps = keywords.get("norm_eps", 1e-5)
        plain: list[Any] = list(self.blocks)
        self.blocks = nn.ModuleList(
            SinkBlock(
                dim, block.mixer, block.mlp, norm=lambda n: nn.RMSNorm(n, eps=norm_eps),
                pattern=pattern, post_norm=post_norm,
            )
            for block in plain
        )  # fmt: skip
        if position == "sinusoid":
            self.learned = Sinusoid(dim)  # type: ignore[assignment]
        if post_norm:
            self.norm = nn.Identity()
        self._initialise(ffn == "swiglu")
        self.register_load_state_dict_pre_hook(_untangle)

    @torch.no_grad()
    def _initialise(self, swiglu: bool) -> None:
        """Weights N(0, 2/5 · 1/inputs); what leaves a SwiGLU N(0, 1/inputs) divided by the depth."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                last = swiglu and name.endswith("mlp.w2")
                inputs = module.weight.shape[1]
                nn.init.normal_(module.weight, std=inputs**-0.5 / len(self.blocks) if last else (0.4 / inputs) ** 0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _untangle(model: nn.Module, params: dict[str, Tensor], *_: Any) -> None:
    """Rows of the authors' projections, group by group the queries, the key and the value, to all q, all k, all v."""
    for name in [n for n in params if ".mixer.interleaved." in n]:
        mixer: Any = model.get_submodule(name[: name.index(".interleaved.")])
        rows = params.pop(name).unflatten(0, (mixer.kv_heads, -1, mixer.head_dim))
        parts = (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])
        params[name.replace("interleaved", "wqkv")] = torch.cat([part.flatten(0, 2) for part in parts])


# How the authors train tinyllama_60m: AdamW on batches of 512 texts of 2,048 tokens of the Pile, about 5B of them.
SCHEDULE: Mapping[str, Any] = dict(
    steps=20_000, batch=512, length=2048, lr=4e-4, warmup=100, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0
)
