"""AgentSD: a diffusion model's self-attention made cheaper without training, by merged tokens that act as agents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.attend import attend
from attnlab.cards import RECIPE, Card, register
from attnlab.nn.mechanism import join_heads, split_heads


def agent_attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, scale: float | None = None, power: float = 0.3,
    shortcut: float = 0.075,
) -> Tensor:  # fmt: skip
    """Softmax attention through given agents, with what training would have fitted set by hand.

        O = softmax(Q Aᵀ · s^power) softmax(A Kᵀ · s) V + shortcut · V

    Heads q (B, H, N, D), k and v (B, H, N, D), agents (B, H, n, D) → (B, H, N, D). s is D^-½ if None; the softer scale
    s^power of the second softmax makes up for agents that are averages. Cost: 4nND per head.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    read = attend(agents, k, v, scale=scale)
    return torch.add(attend(q, agents, read, scale=scale**power), v, alpha=shortcut)


@dataclass(frozen=True)
class Merging:
    """Which tokens of a grid are averaged into which, by similarity; made by `match`.

    `order` (B, S) are the sources, most similar to a target first, `target` (B, S) is the target of each, and `targets`
    (T) the tokens that stay; the first `removed` sources are merged, and for the agents the first `agents_removed`.
    """

    order: Tensor
    target: Tensor
    targets: Tensor
    removed: int
    agents_removed: int

    def merge(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, N, C) → (B, N − removed, C): the unmerged sources, then the targets as means of what fell to them.

        And the agents (B, N − agents_removed, C) likewise; None where they would not be fewer than half of those.
        """
        tokens = self._merge(x, self.removed)
        fewer = 2 * (x.shape[1] - self.agents_removed) < x.shape[1] - self.removed
        return tokens, self._merge(x, self.agents_removed) if fewer else None

    def unmerge(self, y: Tensor) -> Tensor:
        """y (B, N − removed, C) → (B, N, C): each merged source gets what its target has."""
        width = y.shape[-1]
        kept, targets = y.tensor_split((self.order.shape[1] - self.removed,), dim=1)
        merged = targets.gather(1, _wide(self.target[:, : self.removed], width))
        x = y.new_empty(len(y), self.order.shape[1] + len(self.targets), width)
        x[:, self.targets] = targets
        return x.scatter_(1, _wide(self.order, width), torch.cat((merged, kept), dim=1))

    def _merge(self, x: Tensor, removed: int) -> Tensor:
        if removed == 0:
            return x
        width = x.shape[-1]
        sources = x.gather(1, _wide(self.order, width))
        into = _wide(self.target[:, :removed], width)
        targets = x[:, self.targets].scatter_reduce(1, into, sources[:, :removed], "mean")
        return torch.cat((sources[:, removed:], targets), dim=1)


def _wide(index: Tensor, width: int) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, width)


@torch.no_grad()
def match(
    x: Tensor,
    grid: tuple[int, int],
    *,
    cell: tuple[int, int] = (2, 2),
    removed: int,
    agents_removed: int = 0,
    generator: torch.Generator | None = None,
) -> Merging:
    """Pair tokens by cosine similarity of x (B, N, C): one target per cell of the grid, every other token a source.

    The target is the cell's first token or, with a generator, a random one, the same for the whole batch. Tokens
    outside the last whole cell are sources. Each source goes to its most similar target, the most similar first.
    """
    (height, width), (down, across) = grid, cell
    if height * width != x.shape[1]:
        raise ValueError(f"grid must multiply to the number of tokens {x.shape[1]}, got {grid}")
    if min(cell) < 1 or down > height or across > width:
        raise ValueError(f"cell must fit into grid {grid}, got {cell}")
    if removed < 0 or agents_removed < 0:
        raise ValueError(f"removed and agents_removed must be at least 0, got {removed} and {agents_removed}")
    cells = (height // down, width // across)
    inside = torch.zeros(cells, dtype=torch.long)
    if generator is not None:
        inside = torch.randint(down * across, cells, generator=generator, device=generator.device).cpu()
    rows = torch.arange(cells[0])[:, None] * down + inside // across
    columns = torch.arange(cells[1]) * across + inside % across
    stays = torch.zeros(height * width, dtype=torch.bool)
    stays[(rows * width + columns).flatten()] = True
    targets, sources = (mask.nonzero().squeeze(1).to(x.device) for mask in (stays, ~stays))

    unit = nn.functional.normalize(x, dim=-1)
    similarity, target = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).max(-1)
    order = similarity.argsort(dim=-1, descending=True)
    most = len(sources)
    return Merging(sources[order], target.gather(1, order), targets, min(removed, most), min(agents_removed, most))


@dataclass(frozen=True)
class Phase:
    """How much is merged during a stretch of the denoising steps: the shares of the tokens that are removed."""

    cell: int
    ratio: float
    agent_ratio: float


def phase(step: int) -> Phase:
    """The authors' plan for 50 steps: few agents for the first 20, when the layout forms; then plain merging."""
    return Phase(cell=4, ratio=0.4, agent_ratio=0.95) if step < 20 else Phase(cell=2, ratio=0.4, agent_ratio=0.5)


@register(
    Card(
        name="agent_sd",
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        paper="2312.08874",
        system="agent_attention",
        family="tokens",
        kind=RECIPE,
        cost="n N",
    )
)
@contextmanager
def agent_sd(
    model: nn.Module,
    plan: Phase | None = None,
    *,
    power: float = 0.3,
    shortcut: float = 0.075,
    most_downsampled: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[nn.Module]:
    """Run a Stable Diffusion network faster, untrained, inside `with agent_sd(unet, phase(step)):`.

    Patches the self-attention (`attn1`: `to_q`, `to_k`, `to_v`, `to_out`, `heads`) of every `BasicTransformerBlock`, in
    diffusers' or CompVis' layout, and undoes it at the end. Tokens are merged before it and unmerged after it; where
    the merged agents are fewer than half of the tokens, they stand between queries and keys (`agent_attention`), else
    the merged tokens attend as usual. Cross-attention and other layers stay as they are.

    Args:
        model: the denoiser, called with a latent (B, C, H, W) first.
        most_downsampled: layers whose map is at most this many times smaller than the latent are patched.
        generator: picks random targets, for batches of even size (guidance pairs must merge alike); None for the first.

    Source: arXiv 2312.08874 (LeapLabTHU/Agent-Attention, agentsd): SD v1.5 1.7 times faster, FID 28.84 to 28.15.
    """
    plan = plan or Phase(cell=2, ratio=0.5, agent_ratio=0.8)
    blocks: list[Any] = list(model.modules())
    layers = [b.attn1 for b in blocks if type(b).__name__ == "BasicTransformerBlock" and hasattr(b, "attn1")]
    if not layers:
        raise ValueError(
            f"model must hold BasicTransformerBlock modules with an attn1, {type(model).__name__} has none"
        )
    latent: list[int] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sample = inputs[0] if inputs else keywords["sample"]
        latent[:] = sample.shape[-2:]

    def forward(layer: Any, original: Any, x: Tensor, *rest: Any, **keywords: Any) -> Tensor:
        height, width = latent
        shrink = math.ceil(math.sqrt(height * width // x.shape[1]))
        if shrink > most_downsampled or any(value is not None for value in (*rest, *keywords.values())):
            return original(x, *rest, **keywords)  # too coarse, or cross-attention, or masked
        merging = match(
            x,
            (math.ceil(height / shrink), math.ceil(width / shrink)),
            cell=(plan.cell, plan.cell),
            removed=int(x.shape[1] * plan.ratio),
            agents_removed=int(x.shape[1] * plan.agent_ratio),
            generator=generator if x.shape[0] % 2 == 0 else None,
        )
        tokens, agents = merging.merge(x)
        return merging.unmerge(
            original(tokens)
            if agents is None
            else through_agents(layer, tokens, agents, power=power, shortcut=shortcut)
        )

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for layer in layers:
            layer.forward = partial(forward, layer, layer.forward)
        yield model
    finally:
        hook.remove()
        for layer in layers:
            layer.__dict__.pop("forward", None)


def through_agents(
    layer: Any,
    x: Tensor,
    agents: Tensor | None,
    context: Tensor | None = None,
    *,
    power: float = 0.3,
    shortcut: float = 0.075,
) -> Tensor:
    """A host's attention layer on x (B, N, C), with agents (B, n, C) that pass through its query projection.

    With no agents, or no fewer than half of the tokens, it is the layer's own softmax attention.
    """
    source = x if context is None else context
    q, k, v = (
        split_heads(project(t), layer.heads)
        for project, t in ((layer.to_q, x), (layer.to_k, source), (layer.to_v, source))
    )
    scale = getattr(layer, "scale", None)
    if agents is None or 2 * agents.shape[1] >= x.shape[1]:
        heads = attend(q, k, v, scale=scale)
    else:
        a = split_heads(layer.to_q(agents), layer.heads)
        heads = agent_attention(q, k, v, a, scale=scale, power=power, shortcut=shortcut)
    y = join_heads(heads)
    out = layer.to_out
    for step in out if isinstance(out, (nn.ModuleList, nn.Sequential)) else (out,):  # (linear, dropout), as a list
        y = step(y)
    return y
