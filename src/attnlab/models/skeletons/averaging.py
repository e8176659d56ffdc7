"""Stacks of token mixers and channel mixers, each fed with weighted sums of everything that came before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_KINDS = ("paper", "softmax", "samba")


class Average(nn.Module):
    """Σ a_i · (token mixers' outputs) + Σ b_j · (channel mixers' outputs), with learned a and b: `(B, N, C)`.

    Kinds: "paper": scalars, at first 1 for the last output of the kind `follows` and 0 elsewhere; "softmax": each of
    the two vectors through a softmax, uniform at first; "samba": a weight per output and token, 1 at first, each sum
    divided by its number of terms, and the mean of both.
    """

    def __init__(
        self, token_outputs: int, channel_outputs: int, *, kind: str, follows: str = "channels", tokens: int = 0
    ) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(f"averaging must be one of {', '.join(_KINDS)}, got {kind!r}")
        self.kind = kind
        counts = {"tokens": token_outputs, "channels": channel_outputs}
        for name, count in counts.items():
            if kind == "samba":
                start = torch.ones(count, tokens)
            else:
                start = torch.zeros(count)
                if kind == "paper" and name == follows:
                    start[-1] = 1.0
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, token_outputs: Sequence[Tensor], channel_outputs: Sequence[Tensor]) -> Tensor:
        a, b = self.tokens, self.channels
        if self.kind == "softmax":
            a, b = a.softmax(0), b.softmax(0)  # type: ignore[operator]
        elif self.kind == "samba":
            a, b = (w.unsqueeze(-1) / (2 * len(w)) for w in (a, b))  # type: ignore[operator, arg-type]
        pairs = chain(zip(a, token_outputs, strict=True), zip(b, channel_outputs, strict=True))  # type: ignore[arg-type]
        weight, y = next(pairs)
        found = y * weight
        for weight, y in pairs:
            found = torch.addcmul(found, y, weight)
        return found


class AveragedStack(nn.Module):
    """Pairs of mixers, one of tokens then one of channels: `(B, N, C)` to the same, the last channel mixer's output.

        x_T^l = Σ_{i<l} α_li y_T^i + Σ_{i<l} β_li y_C^i,    y_T^l = token_mixer_l(x_T^l)
        x_C^l = Σ_{i≤l} θ_li y_T^i + Σ_{i<l} γ_li y_C^i,    y_C^l = channel_mixer_l(x_C^l)       y_T^0 = y_C^0 = x

    With `kind="paper"` the stack is at first a plain one, mixer after mixer. L pairs have L(2L + 3) weights.
    Source: arXiv 2403.19888, after DenseFormer (2402.02622), which starts so too.
    """

    def __init__(
        self, token_mixers: Sequence[nn.Module], channel_mixers: Sequence[nn.Module], *, kind: str = "paper"
    ) -> None:
        super().__init__()
        if len(token_mixers) != len(channel_mixers):
            raise ValueError(
                f"token_mixers and channel_mixers must be as many, got {len(token_mixers)} and {len(channel_mixers)}"
            )
        if kind == "samba":
            raise ValueError("kind must be 'paper' or 'softmax'; 'samba' has norms of its own, see SambaStack")
        self.token_mixers, self.channel_mixers = nn.ModuleList(token_mixers), nn.ModuleList(channel_mixers)
        depth = range(1, len(token_mixers) + 1)
        self.before_tokens = nn.ModuleList(Average(n, n, kind=kind, follows="channels") for n in depth)
        self.before_channels = nn.ModuleList(Average(n + 1, n, kind=kind, follows="tokens") for n in depth)

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        """`keywords` go to the token mixers."""
        from_tokens, from_channels = [x], [x]
        layers = zip(self.before_tokens, self.token_mixers, self.before_channels, self.channel_mixers, strict=True)
        for first, token_mixer, second, channel_mixer in layers:
            from_tokens.append(token_mixer(first(from_tokens, from_channels), **keywords))
            from_channels.append(channel_mixer(second(from_tokens, from_channels)))
        return from_channels[-1]


class SambaStack(nn.Module):
    """The same with a running residual: `(B, N, C)` to the same.

        before each mixer   r ← r + (last output),   h = norm(r),   mixer(average of all outputs, h as the last of them)

    and norm(r) at the end. Weights are per token, so N is fixed; before the first mixer there is nothing to average.
    This is the variant of sascha-kirch/samba-mixer, which models batteries by it.
    """

    def __init__(
        self, dim: int, tokens: int, token_mixers: Sequence[nn.Module], channel_mixers: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        depth = len(token_mixers)
        if depth != len(channel_mixers):
            raise ValueError(f"token_mixers and channel_mixers must be as many, got {depth} and {len(channel_mixers)}")
        self.token_mixers, self.channel_mixers = nn.ModuleList(token_mixers), nn.ModuleList(channel_mixers)
        self.token_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.channel_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        made = {"kind": "samba", "tokens": tokens}
        self.before_tokens = nn.ModuleList(Average(n + 1, n + 1, **made) if n else nn.Identity() for n in range(depth))  # type: ignore[arg-type]
        self.before_channels = nn.ModuleList(Average(n + 2, n + 1, **made) for n in range(depth))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        from_tokens, from_channels, residual = [x], [x], x
        for i, (token_mixer, channel_mixer) in enumerate(zip(self.token_mixers, self.channel_mixers, strict=True)):
            h = self.token_norms[i](residual)
            if i:
                h = self.before_tokens[i](from_tokens, [*from_channels[:-1], h])
            y = token_mixer(h)
            residual = residual + y
            h = self.before_channels[i]([*from_tokens, self.channel_norms[i](residual)], from_channels)
            from_tokens.append(y)
            from_channels.append(channel_mixer(h))
            residual = residual + from_channels[-1]
        return self.norm(residual)


class Transposed(nn.Module):
    """A token mixer over the channels: mixer(xᵀ)ᵀ, `(B, N, C)` to the same, N being the mixer's width."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.mT).mT
