"""`attend` and `scan` over sequences that are spread over ranks: each rank gives and gets its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnlab.attend import pose
from attnlab.cards import OPERATOR, Card, register
from attnlab.patterns import Full, Pattern
from attnlab.problem import Bias
from attnlab.scale import agree
from attnlab.scale.layout import Layout
from attnlab.scale.ring import Job, ring_attention
from attnlab.scale.states import document_starts, lasp2, sums
from attnlab.scale.ulysses import alone, by_heads, heads_of, ulysses
from attnlab.scale.wire import Mesh, both, wire
from attnlab.scan import _check

METHODS = ("ring", "allgather", "ulysses", "usp", "heads")


@register(
    Card(
        name="context_parallel",
        title="Ring Attention with Blockwise Transformers for Near-Infinite Context",
        paper="2310.01889",
        family="softmax",
        kind=OPERATOR,
        cost="N² / ranks",
    )
)
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: Mesh | tuple[Mesh, Mesh],
    method: str = "ring",
    layout: Layout | None = None,
    kv_layout: Layout | None = None,
    pattern: Pattern | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    kv_chunk: int | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence of which each rank holds a part: what `attnlab.attend` gives on all of it.

        out, lse = attend(q, k, v, mesh=mesh["cp"], pattern=Causal(), layout=Layout.zigzag(n, 4), return_lse=True)

    Forward and backward; a rank's gradients are those of its own q, k, v from the sum of all ranks' losses. Sources:
    arXiv 2310.01889 (ring), 2309.14509 (ulysses), 2405.07719 (usp), 2502.07563 (allgather).

    Args:
        q, k, v: this rank's tokens, `(B, H, n, D)`, `(B, Hkv, m, D)`, `(B, Hkv, m, Dv)`.
        mesh: one dimension of a `DeviceMesh`, or a process group; for usp one of two dimensions (or a pair), that of
            the ring and that of the groups, whose ranks should be neighbours; `layout` counts group after group.
        method: how.

            | method    | what travels, forward                             | needs                  |
            |-----------|---------------------------------------------------|------------------------|
            | ring      | the keys and values that others see, block by block | –                    |
            | allgather | all keys and values, by one collective (LASP-2H)  | room for all of them   |
            | ulysses   | a part of q, k, v for heads, and outputs back     | ranks that divide H    |
            | usp       | ulysses in groups, a ring over the groups         | groups that divide H   |
            | heads     | outputs alone; q, k, v are whole on every rank    | ranks that divide H    |
        layout: which tokens lie on which rank; contiguous blocks of equal length if None.
        kv_layout: that of the keys, if another.
        pattern: on positions of the whole sequence.
        bias: a function of such positions (trained only as a `Lookup`), or a tensor: `(B, H, n, N)`, this rank's rows
            against all keys, for ring and allgather; `(B, H, N, N)` for the others. A table's gradient is the part that
            this rank's queries have in it.
        scale, return_lse: as for `attnlab.attend`.
        kv_chunk: work on so many keys at a time, which may then lie in another memory than q (ring and allgather).
        window: of a ring (also usp's): so many neighbours make an inner ring, which is gone round before the next, so
            that all but one in `window` messages stay within a node. usp with a window is LoongTrain (2406.18485).
        backend: of the other two.

    Raises:
        ValueError, TypeError: on all ranks, before anything large is sent, where they do not fit together.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "usp":
        ranks, inner = both(mesh)
        size = ranks.size * inner.size
    else:
        ranks = inner = wire(mesh)  # type: ignore[arg-type]
        size = ranks.size
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have four axes (batch, heads, tokens, channels), got {tuple(x.shape)}")
    if kv_chunk is not None and (kv_chunk < 1 or method not in ("ring", "allgather")):
        raise ValueError(f"kv_chunk must be positive and goes with ring or allgather, got {kv_chunk} for {method}")
    if window is not None and (method not in ("ring", "usp") or window < 1 or ranks.size % window):
        raise ValueError(
            f"window must divide the {ranks.size} ranks of the ring and goes with ring or usp, "
            f"got {window} for {method}"
        )
    if method in ("ulysses", "usp", "heads"):
        heads_of(inner, q.shape[1], k.shape[1])
    choices = ("attend", method, pattern, kv_layout, scale, kv_chunk, return_lse, window)
    found = agree.lengths(inner, {"q": q, "k": k, "v": v}, choices, layout)
    if method == "usp":  # what a group agrees about, the groups must too
        found = agree.groups(ranks, found, layout)
    rows, held = found["q"], found["k"]
    asked = pattern or Full()
    if method == "heads":
        if len({*rows}) > 1 or len({*held}) > 1:
            raise ValueError(f"q, k and v must be whole on every rank for heads, got {rows} and {held} tokens")
        out, lse = by_heads(
            q, k, v, ranks, pattern=pattern, bias=bias, scale=scale, return_lse=return_lse, backend=backend
        )
        return out if lse is None else (out, lse)
    mine = agree.fitting(layout, rows, size)
    keys = mine if kv_layout is None and rows == held else agree.fitting(kv_layout, held, size, "kv_layout")
    asked.check(mine.length, keys.length)
    if 0 not in q.shape and 0 not in k.shape:  # the rest of what attend checks
        pose(q, k.to(q.device), v.to(q.device), scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if method == "ulysses":
        local = alone(scale=scale, return_lse=return_lse, backend=backend)
        out, lse = ulysses(q, k, v, ranks, mine, keys, local, pattern=pattern, bias=bias)
        return out if lse is None else (out, lse)
    if method == "usp":
        if isinstance(bias, Tensor):
            raise ValueError("bias must be a function of positions for usp, got a tensor")
        rings, groups = mine.groups(inner.size)
        key_rings, key_groups = keys.groups(inner.size)

        def within(
            q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None, bias: Bias | None
        ) -> tuple[Tensor, Tensor | None]:
            return ring_attention(q, k, v, Job(ranks, rings, key_rings, pattern or Full(), scale, bias, window=window))

        at = ranks.rank
        out, lse = ulysses(q, k, v, inner, groups[at], key_groups[at], within, pattern=pattern, bias=bias)
        return (out, lse) if return_lse and lse is not None else out
    gather = method == "allgather"
    job = Job(
        ranks, mine, keys, asked, scale, _four(bias, q, keys.length), gather=gather, chunk=kv_chunk, window=window
    )
    out, lse = ring_attention(q, k, v, job)
    return (out, lse) if return_lse else out


def _four(bias: Any, q: Tensor, keys: int) -> Any:
    if not isinstance(bias, Tensor):
        return bias
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    wanted = (*q.shape[:3], keys)
    if any(n not in (1, w) for n, w in zip(bias.shape, wanted, strict=True)):
        raise ValueError(
            f"bias must be broadcastable to {wanted}, this rank's queries and all keys, got {tuple(bias.shape)}"
        )
    return bias


@register(
    Card(
        name="lasp2",
        title="LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
        paper="2502.07563",
        system="lasp2",
        family="linear",
        kind=OPERATOR,
        cost="N / ranks",
    )
)
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: Mesh,
    layout: Layout | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    causal: bool = True,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A scan over a sequence of which each rank holds a part (LASP-2): what `attnlab.scan` gives on all of it.

        M_t = the state that rank t's tokens leave        one all-gather of all M_t (and of how each forgets)
        out_t = scan of its own tokens + q_t · Σ_{s<t} (what is left of) M_s

    Every mechanism of `attnlab.scan`: additive, decayed per head or channel, delta rule, gated delta rule, KDA. What
    is sent does not grow with the length: `(R − 1) · B · H · Dk · (Dv + 1 or Dk)` numbers for each piece of the layout;
    backward `(R − 1) · B · H · Dk · Dv`. With contiguous blocks there is one piece. Source: arXiv 2502.07563.

    Args:
        q, k, v, decay, beta: this rank's tokens, shaped as for `attnlab.scan`.
        mesh, layout: as for `attend`; pieces may lie anywhere, so a zigzag made for softmax layers will do.
        state: before the first token of all, the same on every rank.
        cu_seqlens: cumulated lengths of sequences packed along the whole sequence (B = 1); each starts empty.
        causal: False sums over all tokens, before and after (the paper's form without a mask; additive only).
        return_state: also return the state after the last token of all, the same on every rank, with gradient.
        backend: of the scan on each rank.
    """
    ranks = wire(mesh)
    _check(q, k, v, decay, beta, state, None, backend)
    choices = (
        "scan",
        layout,
        None if cu_seqlens is None else [int(x) for x in cu_seqlens],
        scale,
        causal,
        return_state,
    )
    held = agree.lengths(ranks, {"q": q, "k": k, "v": v, "decay": decay, "beta": beta}, choices, layout)["q"]
    mine = agree.fitting(layout, held, ranks.size)
    if min(held) < 1:
        raise ValueError(f"every rank must hold at least one token, got {list(held)}")
    starts = document_starts(cu_seqlens, mine.length)
    if cu_seqlens is not None and (len(q) != 1 or state is not None or return_state):
        raise ValueError(f"cu_seqlens wants a batch of 1 and neither state nor return_state, got a batch of {len(q)}")
    q = q if scale is None else q * scale
    if not causal:
        if any(x is not None for x in (decay, beta, state, cu_seqlens)) or return_state:
            raise ValueError(
                "causal=False is for additive states alone: no decay, beta, state, packing or return_state"
            )
        return sums(q, k, v, ranks)
    out, last = lasp2(
        q, k, v, ranks, mine, decay=decay, beta=beta, state=state, starts=starts, last_too=return_state, backend=backend
    )
    return (out, last) if return_state else out
