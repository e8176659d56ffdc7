"""The decoder skeleton: a Llama-shaped language model with any token mechanism as its mixer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attnlab import cards
from attnlab.nn.mechanism import Mechanism, check_heads, difference
from attnlab.positions import ALiBi, Learned, Position, Rotary, Scaling

# A name, a name with keywords of its own, or a function of the layer's index.
Mixer = str | tuple[str, Mapping[str, Any]] | Callable[[int], nn.Module]


class SwiGLU(nn.Module):
    """`w2(silu(w1 x) · w3 x)` over the last axis, `hidden` channels between (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w3 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class DecoderBlock(nn.Module):
    """x = x + mixer(norm1(x)), then x = x + mlp(norm2(x)) if there is one: `(B, N, C)` → the same.

    `(y, state)` with a state.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module | None, *, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.mixer = norm(dim), mixer
        self.norm2, self.mlp = None if mlp is None else norm(dim), mlp

    def forward(self, x: Tensor, *, state: Any = None) -> Any:
        if state is None:
            y = self.mixer(self.norm1(x))
        else:
            y, state = self.mixer(self.norm1(x), state=state)
        x = x + y
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.mlp(self.norm2(x))
        return x if state is None else (x, state)


@dataclass
class DecoderState:
    """What a decoder remembers of the tokens so far, layer by layer. It is written in place; `clone` branches it."""

    model: tuple[Any, ...]
    batch: int
    length: int
    layers: list[Any]

    def clone(self) -> DecoderState:
        return DecoderState(self.model, self.batch, self.length, [_clone(layer) for layer in self.layers])


def _first_difference(theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> str:
    if theirs[:4] != ours[:4]:
        return f"{theirs[:4]}, not {ours[:4]}"
    layer = next(i for i, (a, b) in enumerate(zip(theirs[4:], ours[4:], strict=True)) if a != b)
    return f"in layer {layer}, {difference(theirs[4 + layer], ours[4 + layer])}"


def _clone(state: Any) -> Any:
    if isinstance(state, (tuple, list)):
        parts = [_clone(s) for s in state]
        # A named tuple takes its fields one by one.
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    if isinstance(state, Mapping):
        return {k: _clone(v) for k, v in state.items()}
    return state.clone() if hasattr(state, "clone") else state


class Decoder(nn.Module):
    """A causal language model: embedding → blocks of mixer and SwiGLU, pre-normed by RMSNorm → norm → head.

        logits (B, N, vocabulary) = decoder(ids (B, N))
        logits, state = decoder(ids, state)          pieces of any length give what the whole text gives
        ids (B, N + new) = decoder.generate(ids, new)

    Args:
        mixer: the name of a registered token mechanism, a pair of a name and keywords for it, or a function of the
            layer's index that builds one; or a list of such, one per layer (a hybrid), repeated if shorter than depth.
        mixer_options: keywords for all mixers given by name. Of `causal=True`, `heads`, `kv_heads`, `head_dim`,
            `position` and `layer`, a mechanism gets beside them whatever its constructor names.
        hidden: the width inside SwiGLU; 8/3 · dim, rounded up to a multiple of 64, if None.
        mlp: a function of the layer's index that builds another feed-forward in SwiGLU's place, or gives None for
            none.
        position: "rotary", "alibi", "learned" (a table of `length` places) or "none"; or a `Position` for all layers.
        rope_base, rope_scaling: of the rotary position.
        length: the longest text allowed; None for no limit.
        tied: the head shares the embedding's weights.
        norm_eps: of each RMSNorm.
    """

    _known: tuple[Any, ...] = ()  # the signature of the last state that was found to be its own

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden: int | None = None,
        mixer: Mixer | Sequence[Mixer] = "multihead",
        mixer_options: Mapping[str, Any] | None = None,
        mlp: Callable[[int], nn.Module | None] | None = None,
        position: str | Position = "rotary",
        rope_base: float = 10000.0,
        rope_scaling: Scaling | None = None,
        length: int | None = None,
        tied: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("dim", dim), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        kv_heads, head_dim = check_heads(dim, heads, kv_heads, head_dim)
        self.vocabulary, self.dim, self.length = vocabulary, dim, length
        self.embedding = nn.Embedding(vocabulary, dim)
        self.learned: Learned | None = None
        if position == "learned":
            if length is None:
                raise ValueError("length must be given with position='learned': the size of the table")
            self.learned = Learned(length, dim)
        shared = dict(
            causal=True, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            position=_position(position, heads, head_dim, rope_base, rope_scaling),
        )  # fmt: skip
        hidden = -(-8 * dim // 3 // 64) * 64 if hidden is None else hidden

        def norm(width: int) -> nn.Module:
            return nn.RMSNorm(width, eps=norm_eps)

        pair = isinstance(mixer, tuple) and len(mixer) == 2 and isinstance(mixer[1], Mapping)
        mixers: list[Any] = [mixer] if isinstance(mixer, str) or callable(mixer) or pair else list(mixer)
        if not 1 <= len(mixers) <= depth:
            raise ValueError(f"mixer must be one or a list of 1 to depth = {depth}, got {len(mixers)}")
        options = dict(mixer_options or {})
        if options and all(callable(m) for m in mixers):
            raise ValueError("mixer_options go with the name of a mechanism; a function builds its mixer itself")
        self.blocks = nn.ModuleList(
            DecoderBlock(
                dim,
                _mixer(mixers[i % len(mixers)], dim, {**shared, "layer": i}, options),
                SwiGLU(dim, hidden) if mlp is None else mlp(i),
                norm=norm,
            )
            for i in range(depth)
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        # Small logits at the start, and so a loss of ln(vocabulary), whatever the width.
        nn.init.normal_(self.embedding.weight, std=0.02)
        if not tied:
            nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor, state: DecoderState | None = None, *, last: bool = False) -> Any:
        """Logits `(B, N, vocabulary)` of the next token after each of `ids (B, N)`, and the state if one is given.

        `last=True` gives those after the last token alone, `(B, 1, vocabulary)`.
        """
        offset = self._check(ids, state)
        x = self.embedding(ids)
        if self.learned is not None:
            x = self.learned(x, offset)
        for i, block in enumerate(self.blocks):
            if state is None:
                x = block(x)
            else:
                x, state.layers[i] = block(x, state=state.layers[i])
        if state is not None:
            state.length += ids.shape[1]
        logits = self.head(self.norm(x[:, -1:] if last else x))
        return logits if state is None else (logits, state)

    def _check(self, ids: Tensor, state: DecoderState | None) -> int:
        """The position of the first of `ids`, or an error before anything is written to the state."""
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids must have shape (B, N), not empty, got {tuple(ids.shape)}")
        if ids.is_floating_point():
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        offset = 0
        if state is not None:
            if not isinstance(state, DecoderState):
                raise TypeError(f"state must be what initial_state gives, a DecoderState, got {type(state).__name__}")
            if state.model is not self._known:  # not every setting of every layer at every token
                if state.model != (mine := self._signature):
                    raise ValueError(f"state belongs to another model: {_first_difference(state.model, mine)}")
                self._known = state.model
            if state.batch != len(ids):
                raise ValueError(f"state belongs to a batch of {state.batch}, got ids of {len(ids)}")
            offset = state.length
        if self.length is not None and offset + ids.shape[1] > self.length:
            raise ValueError(f"ids reach position {offset + ids.shape[1]}, but the model's length is {self.length}")
        return offset

    @property
    def _signature(self) -> tuple[Any, ...]:
        """What a state of this model is known by."""
        shape = (("vocabulary", self.vocabulary), ("dim", self.dim), ("depth", len(self.blocks)))
        mixers: list[Any] = [block.mixer for block in self.blocks]
        owners = (m.owner(0) if isinstance(m, Mechanism) else (("", type(m).__name__),) for m in mixers)
        return (type(self).__name__, *shape, *owners)

    def initial_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecoderState:
        """The state before the first token: of each layer a KV cache, or whatever its mixer keeps."""
        weight = self.embedding.weight
        layers = []
        for i, block in enumerate(self.blocks):
            mixer: Any = block.mixer
            if not hasattr(mixer, "initial_state"):
                raise ValueError(f"layer {i}, {type(mixer).__name__}, does not stream: it has no state")
            layers.append(mixer.initial_state(batch, device=device or weight.device, dtype=dtype or weight.dtype))
        return DecoderState(self._signature, batch, 0, layers)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
        cached: bool = True,
    ) -> Tensor:
        """Continue `ids (B, N)` token by token: `(B, N + new)`, the prompt first.

        Args:
            temperature: 0 takes the likeliest token each time.
            top_k: sample among the k likeliest only.
            generator: of the randomness, on the model's device.
            stop: a token that ends a text; what follows it is `stop` again, and all ended texts end the call.
            cached: keep a state. False recomputes the whole text for each token: for mixers that do not stream.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self._check(ids, None)
        end = ids.shape[1] + max_new_tokens
        # The last token is not fed back, so the text may be one longer than what the model reads.
        if self.length is not None and end > self.length + 1:
            raise ValueError(f"ids and max_new_tokens reach {end} tokens, but the model's length is {self.length}")
        state = self.initial_state(len(ids)) if cached else None
        done = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        piece = ids
        for _ in range(max_new_tokens):
            if state is None:
                logits = self(ids, last=True)
            else:
                logits, state = self(piece, state, last=True)
            piece = sample(logits[:, -1], temperature=temperature, top_k=top_k, generator=generator)
            if stop is not None:
                piece = piece.masked_fill(done, stop)
                done = done | (piece == stop)
            ids = torch.cat((ids, piece), 1)
            if stop is not None and bool(done.all()):
                break
        return ids


def sample(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """One token `(B, 1)` from each row of `logits (B, vocabulary)`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _position(
    given: str | Position, heads: int, head_dim: int, base: float, scaling: Scaling | None
) -> Position | None:
    if isinstance(given, Position):
        return given
    if given == "rotary":
        return Rotary(head_dim, base=base, scaling=scaling)
    if given == "alibi":
        return ALiBi(heads)
    if given in ("learned", "none"):
        return None
    raise ValueError(f"position must be rotary, alibi, learned, none or a Position, got {given!r}")


def _mixer(mixer: Mixer, dim: int, shared: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """The mechanism that `mixer` names, with what its constructor knows of the shared keywords."""
    if callable(mixer):
        return mixer(shared["layer"])
    name, own = (mixer, {}) if isinstance(mixer, str) else mixer
    known = _keywords(cards.target(name))
    kept = {keyword: value for keyword, value in shared.items() if keyword in known and value is not None}
    return cards.build(name, dim, **{**kept, **options, **own})


def _keywords(target: Callable[..., Any]) -> set[str]:
    """The keywords that a constructor takes, through `**keywords` up to its base classes."""
    found: set[str] = set()
    homes = [target]
    if inspect.isclass(target):
        homes = [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)]
    for home in homes:
        parameters = inspect.signature(home).parameters.values()
        found |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found
