"""SinkLoRA: a language model learns to read longer texts, by few weights, in groups with sinks; then sees everything.

prepare(model, factor=4)                     # groups and sinks, low-rank updates, positions interpolated
finetune(model, batches)
finish(model)                                # updates merged, full attention
generate(model, ids, 100, heavy=512, recent=512)    # with a cache that drops what is not attended to
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnlab.cards import RECIPE, Card, register
from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.heavy_hitters import HeavyHitters
from attnlab.nn.sparse.shifted_groups import ShiftedGroups
from attnlab.positions import Linear, Rotary
from attnlab.recipes.layers import attention_layers, replace_attention

# Of the 28,000 items of LongAlpaca-Plus, on which the authors train.
LONGALPACA_PLUS = {"natural questions": 0.44, "redpajama": 0.27, "book summaries": 0.18, "long questions": 0.11}


class LowRank(nn.Module):
    """W → W + α/r · BA, for each stretch of W's rows alone (queries, keys and values in one matrix): LoRA.

    A `(r, C)` begins at random and B `(rows, r)` at zero, so that nothing changes at first. Put on a weight by
    `torch.nn.utils.parametrize`, whose `remove_parametrizations` merges it. Costs 2·r·C·rows FLOPs a step, whatever
    the batch. Source: arXiv 2106.09685.
    """

    def __init__(self, weight: Tensor, rows: Sequence[int], *, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if sum(rows) != len(weight):
            raise ValueError(f"rows must sum to the weight's {len(weight)}, got {tuple(rows)}")
        self.scale = alpha / rank
        self.a = nn.ParameterList(
            nn.init.kaiming_uniform_(weight.new_empty(rank, weight.shape[1]), 5**0.5) for _ in rows
        )
        self.b = nn.ParameterList(weight.new_zeros(n, rank) for n in rows)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * torch.cat([b @ a for a, b in zip(self.a, self.b, strict=True)])


@register(
    Card(
        name="sinklora",
        title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
        paper="2406.05678",
        system="sinklora",
        family="fine-tuning",
        kind=RECIPE,
        cost="N (G + s)",
    )
)
def prepare(
    model: nn.Module,
    *,
    factor: float = 1.0,
    rank: int = 8,
    alpha: float = 16.0,
    groups: dict[str, Any] | None = None,
) -> nn.Module:
    """Makes a trained causal model ready to be fine-tuned on texts `factor` times longer than its own, in place.

    Each `MultiHead` layer becomes `ShiftedGroups` of a quarter of the text, a quarter of the heads moved, four sinks:
    its cost grows with N, not N². Trained are low-rank updates of its projections (queries, keys, values and output
    each of `rank`), embeddings and norms, nothing else; rotary positions are interpolated. Nothing changes at first but
    what is seen. Returns the model. Source: arXiv 2406.05678, and LongLoRA, 2309.12307.

    Args:
        factor: how much longer texts become; the authors round up to a whole number.
        rank, alpha: of the updates; the authors' 8 and 16.
        groups: keywords of `ShiftedGroups`; `dict(moved=0.5, sinks=0, wrap=True, variant="release")` is LongLoRA.
    """
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    layers = [layer for _, _, layer in attention_layers(model, MultiHead)]
    if any(not layer.causal for layer in layers):
        raise ValueError("model must be causal: every attention layer of it")
    _interpolate(layers, factor)
    replace_attention(model, ShiftedGroups, **{"group": 0.25, **(groups or {})})
    for p in model.parameters():
        p.requires_grad_(False)
    for _, _, layer in attention_layers(model, ShiftedGroups):
        width, own = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        for linear, rows in ((layer.wqkv, (width, own, own)), (layer.wo, (layer.dim,))):
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rows, rank=rank, alpha=alpha))
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.LayerNorm, nn.RMSNorm)):
            for p in module.parameters(recurse=False):
                p.requires_grad_()
    return model


def _interpolate(layers: Sequence[MultiHead], factor: float) -> None:
    """Angles of all rotary positions divided by `factor`; layers that share one go on sharing one."""
    if factor == 1:
        return
    stretched: dict[int, Rotary] = {}
    for layer in layers:
        old = layer.position
        if not isinstance(old, Rotary) or old.scaling is not None:
            what = "another position" if not isinstance(old, Rotary) else str(old.scaling)
            raise ValueError(f"factor must be 1 for a model without plain rotary positions, got {factor} for {what}")
        if id(old) not in stretched:
            stretched[id(old)] = Rotary(
                old.head_dim, base=old.base, dim=old.dim, interleaved=old.interleaved, scaling=Linear(factor)
            )
        layer.position = stretched[id(old)]


def finetune(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    rate: float = 2e-5,
    warm_up: int = 20,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> list[float]:
    """Trains what `prepare` left trainable, in place, by AdamW without decay; the loss at each step.

    The rate is constant after `warm_up` steps of rising. The authors take the items of LongAlpaca-Plus one by one,
    three times, in bfloat16.

    Args:
        batches: ids `(B, N)`, each one step.
        loss: of the model and a batch; that of the next token if None.
    """
    if warm_up < 0:
        raise ValueError(f"warm_up must be 0 or more, got {warm_up}")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    model.train()
    history = []
    for step, ids in enumerate(batches):
        value = (loss or next_token_loss)(model, ids)
        optimizer.zero_grad()
        value.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(warm_up, 1))
        optimizer.step()
        history.append(value.item())
    return history


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross entropy of each token of `ids (B, N)` but the first, given those before it; all N are read."""
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def finish(model: nn.Module) -> nn.Module:
    """Merges the updates of `prepare` and gives the model full attention again, in place. Returns the model."""
    for _, _, layer in attention_layers(model, ShiftedGroups):
        for linear in (layer.wqkv, layer.wo):
            if parametrize.is_parametrized(linear, "weight"):
                parametrize.remove_parametrizations(linear, "weight")
    replace_attention(model, MultiHead, of=ShiftedGroups)
    return model.requires_grad_()


def generate(
    model: Decoder, ids: Tensor, max_new_tokens: int, *, heavy: int = 256, recent: int = 256, **options: Any
) -> Tensor:
    """`Decoder.generate` in bounded memory: the prompt is read in full, and then each layer's cache drops tokens.

    Kept are `heavy` + `recent` tokens of each key-value head (see `HeavyHitters`); `options` are `generate`'s. With as
    many as the whole text has, nothing is dropped. The model itself stays as it is.
    """
    layers = list(attention_layers(model, MultiHead))
    try:
        replace_attention(model, HeavyHitters, heavy=heavy, recent=recent, prompt=ids.shape[1], dropout=0.0)
        return model.generate(ids, max_new_tokens, **options)
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
