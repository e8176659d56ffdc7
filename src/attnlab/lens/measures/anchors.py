"""Where a model's reasoning plans and where it anchors: how far local heads look back, and what later tokens look at.

The two signals of a response, and the multipliers of its tokens' advantages that they give (arXiv 2510.13554).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.cards import LENS, Card, register

MODES = ("local", "anchor", "coupled")


class Rhythm(NamedTuple):
    """What the maps of one response say of its n tokens."""

    waad: Tensor  # (n)
    fai: Tensor  # (n)
    delta: Tensor  # (n): how much WAAD changes to the next token; 0 at the last
    local: Tensor  # bool, the heads that look near, in the shape of the maps' leading axes
    broad: Tensor  # bool, those that look far


def mean_distances(weights: Tensor, prompt: int = 0) -> Tensor:
    """How far each head looks back on average over the response's rows: causal `(…, N, N)` → `(…)`.

    d = 1/|R| Σ_{t ∈ R} Σ_{s ≤ t} A_ts (t − s)        R: the rows from `prompt` on
    """
    _check(weights, prompt)
    return (_rows(weights, prompt) * _distance(weights, prompt)).sum(-1).mean(-1)


def head_groups(distances: Tensor, share: float = 0.3) -> tuple[Tensor, Tensor]:
    """The heads of smallest and of largest `distances`, `share` of all in each: bool masks of the same shape.

    As many as ⌊share · heads⌋, at least one; of equal distances the earlier heads are the nearer.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be above 0 and at most ½, got {share}")
    count = max(1, int(share * distances.numel() + 1e-9))
    order = distances.flatten().argsort(stable=True)
    groups = []
    for chosen in (order[:count], order[len(order) - count :]):
        mask = torch.zeros(distances.numel(), dtype=torch.bool, device=distances.device)
        mask[chosen] = True
        groups.append(mask.view(distances.shape))
    return groups[0], groups[1]


@register(
    Card(
        name="waad",
        title="Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy "
        "Optimization",
        paper="2510.13554",
        system="preplan_anchor",
        family="lens",
        kind=LENS,
        cost="N²",
    )
)
def waad(weights: Tensor, prompt: int = 0, *, window: int = 10) -> Tensor:
    """Windowed average attention distance of each token of the response: causal `(…, N, N)` → `(…, N − prompt)`.

        WAAD_t = Σ_{s ≤ t} A_ts · min(t − s, W)

    Of the local heads' mean map it is high where the model looks back over what it has said, before it goes on: it
    plans. Distances are cut at W; weights beyond it stay, and count W each. At most W. Source: arXiv 2510.13554.
    """
    _check(weights, prompt)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return (_rows(weights, prompt) * _distance(weights, prompt).clamp(0, window)).sum(-1)


@register(
    Card(
        name="fai",
        title="Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy "
        "Optimization",
        paper="2510.13554",
        system="preplan_anchor",
        family="lens",
        kind=LENS,
        cost="N²",
    )
)
def fai(weights: Tensor, prompt: int = 0, *, lo: int = 10, hi: int = 50) -> Tensor:
    """Future attention influence of every token, prompt included: causal `(…, N, N)` → `(…, N)`.

        FAI_s = mean of A_ts over the rows t of the response with s + lo ≤ t ≤ s + hi; 0 where there are none

    Of the far-looking heads' mean map it is high at tokens to which the text comes back: anchors. What the next tokens
    give does not count. In [0, 1]. Source: arXiv 2510.13554.
    """
    _check(weights, prompt)
    if not 0 <= lo <= hi:
        raise ValueError(f"lo and hi must be 0 ≤ lo ≤ hi, got {lo} and {hi}")
    distance = _distance(weights, prompt)
    counted = (distance >= lo) & (distance <= hi)
    return (_rows(weights, prompt) * counted).sum(-2) / counted.sum(-2).clamp_min(1)


def receiver_scores(weights: Tensor, prompt: int = 0, *, lo: int = 10) -> Tensor:
    """How much each head's later queries agree on a few keys: causal `(…, N, N)` → `(…)`, the kurtosis of its columns.

        m₄/m₂² of FAI_s with no upper end, over the keys that a row of the response can count

    3 where what keys receive is normally spread; receiver heads, which narrate from a few anchors, have far more.
    Source: arXiv 2510.13554.
    """
    if weights.shape[-1] < lo + 2:
        raise ValueError(f"weights must be of more than {lo + 1} tokens, got {weights.shape[-1]}")
    influence = fai(weights, prompt, lo=lo, hi=weights.shape[-1])[..., : weights.shape[-1] - lo]
    spread = influence - influence.mean(-1, keepdim=True)
    variance = spread.square().mean(-1)
    return spread.pow(4).mean(-1) / variance.square().clamp_min(torch.finfo(weights.dtype).tiny)


def peaks(values: Tensor, quantile: float = 0.8) -> Tensor:
    """Where `(n)` is no lower than next to it, and at least its own quantile: a bool mask."""
    if values.dim() != 1 or not len(values):
        raise ValueError(f"values must be those of one response, (n), got {tuple(values.shape)}")
    edge = torch.nn.functional.pad(values, (1, 1), value=-torch.inf)
    return (values >= edge[:-2]) & (values >= edge[2:]) & (values >= values.quantile(quantile))


def coupling(
    at: Tensor, values: Tensor, *, ahead: int = 0, shuffles: int = 200, generator: torch.Generator | None = None
) -> float:
    """How much higher `values (n)` are at the places `at (n)`, bool, than at as many places at random: a ratio.

    With `ahead` the mean of each place and so many after it counts: what follows. The values may be a mask of other
    peaks, and the ratio is then how much oftener one is met. The paper's couplings: token entropy at peaks of WAAD
    (+52 %), peaks of FAI at or after them (+42 %). Source: arXiv 2510.13554.
    """
    if at.shape != values.shape or at.dim() != 1 or not bool(at.any()):
        raise ValueError(f"at and values must be (n), at somewhere true, got {tuple(at.shape)}, {tuple(values.shape)}")
    if ahead < 0 or shuffles < 1:
        raise ValueError(f"ahead must be 0 or more and shuffles 1 or more, got {ahead} and {shuffles}")
    ends = torch.arange(len(at), device=at.device).add(ahead + 1).clamp_max(len(at))
    sums = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    begins = torch.arange(len(at), device=at.device)
    each = (sums[ends] - sums[begins]) / (ends - begins)
    count = int(at.sum())
    chance = sum(each[torch.randperm(len(at), generator=generator)[:count]].mean().item() for _ in range(shuffles))
    return each[at].mean().item() / (chance / shuffles) if chance else float("nan")


def changes(values: Tensor) -> Tensor:
    """|v_t − v_{t+1}| for `(…, n)`, with 0 at the last: the δ of WAAD."""
    return torch.cat((values.diff(dim=-1).abs(), torch.zeros_like(values[..., :1])), -1)


def top_share(values: Tensor, share: float = 0.4) -> Tensor:
    """The ⌊share · n⌋ largest of `(n)`, at least one, as a bool mask; of equal ones the earlier."""
    if values.dim() != 1 or not len(values):
        raise ValueError(f"values must be those of one response, (n), got {tuple(values.shape)}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[values.argsort(descending=True, stable=True)[: max(1, int(share * len(values) + 1e-9))]] = True
    return mask


@torch.no_grad()
def rhythm(
    maps: Tensor, prompt: int, *, share: float = 0.3, window: int = 10, lo: int = 10, hi: int = 50
) -> Rhythm:  # fmt: skip
    """Both signals of one response: maps `(…, N, N)` of all heads of the layers to look at, rows from `prompt` on.

    The heads are sorted by `mean_distances`; WAAD is of the mean map of the nearest `share`, FAI of the farthest.
    """
    if maps.dim() < 3:
        raise ValueError(f"maps must be (…, N, N) of several heads, got {tuple(maps.shape)}")
    local, broad = head_groups(mean_distances(maps, prompt), share)
    near = waad(maps[local].mean(0), prompt, window=window)
    return Rhythm(near, fai(maps[broad].mean(0), prompt, lo=lo, hi=hi)[prompt:], changes(near), local, broad)


@torch.no_grad()
def multipliers(
    waad: Tensor,
    fai: Tensor,
    mode: str = "coupled",
    *,
    gain: float = 1.5,
    share: float = 0.4,
    back: int = 3,
    passed_on: float = 0.5,
    near: float = 0.5,
    turn: float = 0.6,
) -> Tensor:
    """What to multiply the advantage of each token of one response by: WAAD and FAI `(n)` → γ `(n)`.

    local      1 + (g−1) [t among the top `share` by δ_t = |WAAD_t − WAAD_{t+1}|]
    anchor     1 + (g−1) [t ∈ T]                        T: the top `share` by FAI
    coupled    1 + (g−1) [t ∈ T∖D] + (1−a)(g−1) [t ∈ D] + a(g−1) [t ∈ intro(D)]

    Coupled, anchors D that a plan led to pass on a share a = `passed_on` of their bonus to where the plan began.
    t ∈ T is in D if it looks near itself, WAAD_t ≤ its quantile `near`, just after a turn: the largest δ of the `back`
    tokens before it, at intro(t), is at least δ's quantile `turn`. Quantiles are the response's. The paper leaves these
    two open, and a. Source: arXiv 2510.13554.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if waad.shape != fai.shape or waad.dim() != 1 or not len(waad):
        raise ValueError(f"waad and fai must be (n) of one response, got {tuple(waad.shape)} and {tuple(fai.shape)}")
    if gain < 1 or not 0 <= passed_on <= 1 or back < 1:
        raise ValueError(
            f"gain must be at least 1, passed_on in [0, 1], back at least 1, got {gain}, {passed_on}, {back}"
        )
    delta = changes(waad)
    gamma, bonus = torch.ones_like(waad), gain - 1
    if mode != "coupled":
        return gamma + bonus * top_share(delta if mode == "local" else fai, share)
    anchors = top_share(fai, share)
    # The largest turn among the `back` tokens before each, and where it is; nothing stands before the first.
    before = torch.nn.functional.pad(delta, (back, 0), value=-1.0).unfold(0, back, 1)[: len(delta)]
    largest, place = before.max(-1)
    led = anchors & (waad <= waad.quantile(near)) & (largest >= delta.quantile(turn)) & (largest >= 0)
    intro = torch.zeros_like(anchors)
    intro[(torch.arange(len(delta), device=delta.device) - back + place)[led]] = True
    return gamma + bonus * (anchors & ~led) + (1 - passed_on) * bonus * led + passed_on * bonus * intro


def _rows(weights: Tensor, prompt: int) -> Tensor:
    return weights[..., prompt:, :]


def _distance(weights: Tensor, prompt: int) -> Tensor:
    """t − s for the rows of the response, `(n, N)`."""
    place = torch.arange(weights.shape[-1], device=weights.device)
    return place[prompt:, None] - place


def _check(weights: Tensor, prompt: int) -> None:
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be square matrices (…, N, N), got {tuple(weights.shape)}")
    if not 0 <= prompt < weights.shape[-1]:
        raise ValueError(f"prompt must leave a response: 0 to {weights.shape[-1] - 1}, got {prompt}")
