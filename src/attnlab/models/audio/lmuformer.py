"""LMUFormer: words from frames of sound as they come, with Legendre memory in attention's place, and of spikes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import OPERATOR, STREAMING, Card, Size, register
from attnlab.models.skeletons.parts import trunc_normal_linear
from attnlab.nn.cache import Owner
from attnlab.nn.linear.lmu import LMU
from attnlab.nn.spiking.lif import LIF
from attnlab.nn.spiking.lmu import SpikingLMU
from attnlab.nn.spiking.token_norm import TokenNorm

Spiking = Literal["", "spikes", "membrane"]

# Parameters with 35 classes, as the authors' code has.
SIZES = {
    "lmuformer": Size(1_621_796, {}),
    "lmuformer_spikes": Size(1_689_382, {"spiking": "spikes"}),
    "lmuformer_membrane": Size(1_689_894, {"spiking": "membrane"}),
}


@dataclass
class LMUFormerState:
    """What is kept of the sound so far: by layer, and the sum of the features of the frames that are done."""

    kept: dict[str, Any] = field(default_factory=dict)
    total: Tensor | None = None
    frames: int = 0
    last: bool = False
    owner: Owner = ()


def through(module: nn.Module, x: Tensor, state: LMUFormerState | None, name: str) -> Tensor:
    """`module(x)`; where a state goes along, from what the layer of this name kept, and it keeps what comes after."""
    if state is None:
        return module(x)
    if isinstance(module, TokenConv):
        y, state.kept[name] = module(x, state.kept.get(name), last=state.last)
    elif isinstance(module, LIF):
        y, state.kept[name] = module(x, state.kept.get(name))
    elif isinstance(module, (LMU, SpikingLMU)):
        before = state.kept.get(name) or module.initial_state(len(x), device=x.device, dtype=x.dtype)
        y, state.kept[name] = module(x, state=before) if x.shape[1] else (x, before)
    else:
        y = module(x)
    return y


class TokenConv(nn.Linear):
    """A convolution over three tokens without bias, `(B, N, C)` to `(B, N, out_dim)`: one product, no transpose.

    The weight is `(out_dim, 3 C)`, the token before first. Called with what it kept of the last piece (None at the
    start), it gives the tokens whose right neighbour is there, all that are left where the piece is the `last`.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(3 * dim, out_dim, bias=False)

    def forward(self, x: Tensor, *past: Tensor | None, last: bool = True) -> Any:
        if past and past[0] is not None:
            x = torch.cat((past[0], x), 1)
            x = F.pad(x, (0, 0, 0, int(last)))
        else:
            x = F.pad(x, (0, 0, 1, int(last)))
        done = max(x.shape[1] - 2, 0)
        y = super().forward(torch.cat([x[:, i : i + done] for i in range(3)], -1))
        return (y, x[:, -2:]) if past else y


class Embedding(nn.Module):
    """Frames to tokens by four convolutions, and a fifth that tells neighbours apart: `(B, N, mels)` to `(B, N, dim)`.

    x ← BN(ReLU(conv x)), four times,   x + conv x
    of spikes: x ← LIF(BN(conv x)), four times,   x + LIF(BN(conv x))
    membrane: the same three times,   x ← conv x,   x + conv(LIF(BN(x)))
    """

    def __init__(self, mels: int, dim: int, spiking: Spiking) -> None:
        super().__init__()
        self.spiking = spiking
        self.convs = nn.ModuleList(TokenConv(dim if i else mels, dim) for i in range(4))
        self.norms = nn.ModuleList(TokenNorm(dim) for _ in range(4))
        self.acts = nn.ModuleList(LIF(axis=1) if spiking else nn.ReLU() for _ in range(4))
        self.rpe = TokenConv(dim, dim)
        self.rpe_norm = TokenNorm(dim) if spiking == "spikes" else nn.Identity()
        self.rpe_act = LIF(axis=1) if spiking == "spikes" else nn.Identity()

    def forward(self, x: Tensor, state: LMUFormerState | None = None) -> Tensor:
        for i, (conv, norm, act) in enumerate(zip(self.convs, self.norms, self.acts, strict=True)):
            x = through(conv, x, state, f"conv{i}")
            if self.spiking == "membrane" and i == 3:
                near = through(act, norm(x), state, "act3")
            else:
                x = near = through(act, norm(x), state, f"act{i}") if self.spiking else norm(act(x))
        near = through(self.rpe_act, self.rpe_norm(through(self.rpe, near, state, "rpe")), state, "rpe_act")
        if state is None:
            return x + near
        # Tokens wait here for the convolution, which waits for their right neighbours.
        waiting = x if (before := state.kept.get("waiting")) is None else torch.cat((before, x), 1)
        done = near.shape[1]
        state.kept["waiting"] = waiting[:, done:]
        return waiting[:, :done] + near


class FeedForward(nn.Module):
    """Two linear layers with batch norms: `(B, N, C)` to the same.

    ReLU(BN(fc2(GELU(BN(fc1 x))))); of spikes, LIF in place of both; membrane: fc2(LIF(BN(fc1(LIF(BN(x)))))).
    """

    def __init__(self, dim: int, hidden: int, spiking: Spiking = "") -> None:
        super().__init__()
        self.first = spiking == "membrane"
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = (TokenNorm(c) for c in ((dim, hidden) if self.first else (hidden, dim)))
        self.act1: nn.Module = LIF(axis=1) if spiking else nn.GELU()
        self.act2: nn.Module = LIF(axis=1) if spiking else nn.ReLU()

    def forward(self, x: Tensor, state: LMUFormerState | None = None, name: str = "") -> Tensor:
        if self.first:
            x = self.fc1(through(self.act1, self.norm1(x), state, f"{name}act1"))
            return self.fc2(through(self.act2, self.norm2(x), state, f"{name}act2"))
        x = through(self.act1, self.norm1(self.fc1(x)), state, f"{name}act1")
        return through(self.act2, self.norm2(self.fc2(x)), state, f"{name}act2")


class LMUBlock(nn.Module):
    """x + BN(proj(LMU(x))), then x + FFN(x): `(B, N, C)` to the same.

    Of spikes: the first path ends in LIF. Membrane: it begins with LIF(BN(x)) of threshold ½. `mixer` may be another
    module from tokens to tokens.
    """

    def __init__(self, dim: int, *, mixer: nn.Module, hidden: int, spiking: Spiking = "") -> None:
        super().__init__()
        self.mixer, self.proj, self.norm = mixer, nn.Linear(dim, dim), TokenNorm(dim)
        membrane = spiking == "membrane"
        self.first_norm = TokenNorm(dim) if membrane else nn.Identity()
        self.first_act = LIF(axis=1, threshold=0.5) if membrane else nn.Identity()
        self.act = LIF(axis=1) if spiking == "spikes" else nn.Identity()
        self.mlp = FeedForward(dim, hidden, spiking)

    def forward(self, x: Tensor, state: LMUFormerState | None = None, name: str = "") -> Tensor:
        y = through(self.first_act, self.first_norm(x), state, f"{name}first")
        y = self.norm(self.proj(through(self.mixer, y, state, f"{name}mixer")))
        x = x + through(self.act, y, state, f"{name}act")
        return x + self.mlp(x, state, name)


@register(
    Card(
        name="lmuformer",
        title="LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units",
        paper="2402.04882",
        system="lmuformer",
        family="linear",
        kind=OPERATOR,
        capabilities=STREAMING,
        cost="N log N",
        sample={"mels": 8, "dim": 12, "window": 16, "num_classes": 5},
        sizes=SIZES,
        state="2 * mels + 10 * dim + depth * memory + neurons",
    )
)
class LMUFormer(nn.Module):
    """Frames of sound to a class, all at once or as they come: a prediction at each frame, at a fixed cost and memory.

        embedding (five convolutions of 3) → [x + LMU(x), x + FFN(x)] × depth → head → mean over frames

    Log-mel frames `(B, N, mels)` to logits `(B, num_classes)`. `prefixes(x)` gives `(B, N, num_classes)`: what it says
    after each frame. With a state, pieces of any length give the same, five frames late, which is as far as the
    convolutions look ahead; `finish` gives the last five:

        state = net.initial_state(1)
        for piece in sound:                                   # (1, n, mels)
            logits, state = net(piece, state=state)           # (1, about n, num_classes)
        logits = net.finish(state)

    Nothing is ever computed twice. N·C² operations, and C·N log N. The paper reads one second of speech as 128 frames
    of 128 log-mels. Source: arXiv 2402.04882 (zeyuliu1037/LMUFormer).

    Args:
        spiking: "" for real numbers, ReLU and GELU; "spikes" for neurons in their place, whose time is the sequence;
            "membrane" for neurons before each linear layer, so that blocks add potentials: the paper's best of spikes.
        window: θ of the memory, in frames. memory: its size q; `dim`, and with spikes twice that, if None.
    """

    def __init__(
        self,
        *,
        mels: int = 128,
        dim: int = 256,
        depth: int = 1,
        mlp_ratio: float = 4.0,
        window: int = 128,
        memory: int | None = None,
        num_classes: int = 35,
        spiking: Spiking = "",
    ) -> None:
        super().__init__()
        if spiking not in ("", "spikes", "membrane"):
            raise ValueError(f"spiking must be '', 'spikes' or 'membrane', got {spiking!r}")
        if mels < 1 or depth < 1:
            raise ValueError(f"mels and depth must be at least 1, got {mels} and {depth}")
        self.mels, self.dim, self.depth, self.spiking = mels, dim, depth, spiking
        self.memory = memory or (2 * dim if spiking else dim)
        self.hidden = int(dim * mlp_ratio)
        self.embed = Embedding(mels, dim, spiking)
        mixer = partial(SpikingLMU if spiking else LMU, dim, memory=self.memory, window=window)
        self.blocks = nn.ModuleList(
            LMUBlock(dim, mixer=mixer(), hidden=self.hidden, spiking=spiking) for _ in range(depth)
        )
        membrane = spiking == "membrane"
        self.norm = TokenNorm(dim) if membrane else nn.Identity()
        self.act = LIF(axis=1) if membrane else nn.Identity()
        self.head = nn.Linear(dim, num_classes)
        # Convolutions keep their own start.
        self.blocks.apply(trunc_normal_linear)
        trunc_normal_linear(self.head)

    @property
    def neurons(self) -> int:
        """How many potentials a state holds."""
        block = 3 * self.dim + self.hidden + self.memory + 1
        return 5 * self.dim + self.depth * block if self.spiking else 0

    def features(self, x: Tensor, state: LMUFormerState | None = None) -> Tensor:
        """What the head reads, at each frame that is done: `(B, n, dim)`."""
        x = self.embed(x, state)
        for i, block in enumerate(self.blocks):
            x = block(x, state, f"blocks.{i}.")
        return through(self.act, self.norm(x), state, "act")

    def prefixes(self, x: Tensor) -> Tensor:
        """The logits after each frame, `(B, N, num_classes)`, as if the sound ended there but for the five ahead."""
        self._check(x)
        counts = torch.arange(1, x.shape[1] + 1, device=x.device).view(-1, 1)
        return self.head(self.features(x).cumsum(1) / counts)

    def initial_state(self, batch: int) -> LMUFormerState:
        return LMUFormerState(owner=self._owner(batch))

    def finish(self, state: LMUFormerState) -> Tensor:
        """The logits after each of the frames that waited for what would follow: `(B, ≤ 5, num_classes)`."""
        self._check_state(state, None)
        if "conv0" not in state.kept:
            raise ValueError("state must have seen a frame: it is as initial_state gave it")
        return self._next(state.kept["conv0"][:, :0], replace(state, kept=dict(state.kept), last=True))

    def forward(self, x: Tensor, *, state: LMUFormerState | None = None) -> Any:
        self._check(x)
        if state is None:
            return self.head(self.features(x).mean(1))
        self._check_state(state, len(x))
        state = replace(state, kept=dict(state.kept))
        return self._next(x, state), state

    def _next(self, x: Tensor, state: LMUFormerState) -> Tensor:
        features = self.features(x, state)
        sums = features.cumsum(1) if state.total is None else features.cumsum(1) + state.total.unsqueeze(1)
        counts = torch.arange(1, sums.shape[1] + 1, device=x.device).view(-1, 1) + state.frames
        if sums.shape[1]:
            state.total, state.frames = sums[:, -1], state.frames + sums.shape[1]
        return self.head(sums / counts)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[2] != self.mels or not x.shape[1]:
            raise ValueError(f"x must be frames (B, N ≥ 1, mels = {self.mels}), got {tuple(x.shape)}")

    def _owner(self, batch: int) -> Owner:
        sizes = ((name, getattr(self, name)) for name in ("mels", "dim", "depth", "memory", "spiking"))
        return (("", "LMUFormer"), ("batch", batch), *sizes)

    def _check_state(self, state: Any, batch: int | None) -> None:
        if not isinstance(state, LMUFormerState):
            raise TypeError(f"state must be what initial_state gives, an LMUFormerState, got {type(state).__name__}")
        if state.last:
            raise ValueError("state must not be finished: its sound has ended")
        mine = self._owner(dict(state.owner)["batch"] if batch is None else batch)
        if state.owner != mine:
            raise ValueError(f"state belongs to another model or batch: {dict(state.owner)}, not {dict(mine)}")
