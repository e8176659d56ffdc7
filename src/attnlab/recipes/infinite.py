"""Put infinite self-attention into a trained model: its projections stay, its softmax goes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import RECIPE, Card, register
from attnlab.nn.linear.infinite import InfiniteAttention, LinearInfiniteAttention
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead


class InTorch(nn.Module):
    """`InfiniteAttention` called as `nn.MultiheadAttention` is: `(query, key, value) -> (output, weights or None)`.

    Masks are refused, where the released module ignores them.
    """

    in_proj_bias = None  # so that nn.TransformerEncoderLayer takes no way around forward
    _qkv_same_embed_dim = True

    def __init__(self, inner: InfiniteAttention, batch_first: bool) -> None:
        super().__init__()
        self.inner, self.batch_first = inner, batch_first
        self.embed_dim, self.num_heads = inner.dim, inner.heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError("infinite self-attention takes no mask: its norm is over all tokens")
        three = (query, key, value) if self.batch_first else tuple(t.transpose(0, 1) for t in (query, key, value))
        inner, bias = self.inner, self.inner.wqkv.bias
        parts = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            split_heads(F.linear(t, w, b), inner.heads)
            for t, w, b in zip(three, inner.wqkv.weight.chunk(3), parts, strict=True)
        )
        y = inner.merge(inner.heads_of(q, k, v))
        weights = None
        if need_weights:
            units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
            weights = inner.heads_of(q, k, units)
            weights = weights.mean(1) if average_attn_weights else weights
        return (y if self.batch_first else y.transpose(0, 1)), weights


@register(
    Card(
        name="infsa_convert",
        title="Self-Attention And Beyond the Infinite: Towards Linear Transformers with Infinite Self-Attention",
        paper="2603.00175",
        family="linear",
        kind=RECIPE,
        cost="N",
    )
)
def convert(model: nn.Module, *, linear: bool = False, rho: float = 0.95, train_rho: bool = True) -> int:
    """Replace every softmax attention in `model`, in place, by infinite self-attention; returns how many there were.

    Found are `nn.MultiheadAttention`, our `MultiHead`, and modules in the manner of timm, with Linear layers `qkv` and
    `proj` and `num_heads`. Projections are copied; the model is then to be trained further. Cost: as of the mechanisms.
    Source: arXiv 2603.00175.

    Args:
        linear: the linear form. rho, train_rho: of `InfiniteAttention`.
    """
    kind, found = LinearInfiniteAttention if linear else InfiniteAttention, 0
    for parent in list(model.modules()):
        if isinstance(parent, (InTorch, InfiniteAttention)):
            continue
        for name, child in list(parent.named_children()):
            read = _projections(child)
            if read is None:
                continue
            heads, qkv, qkv_bias, out, out_bias = read
            new = kind(len(out), heads=heads, bias=qkv_bias is not None or out_bias is not None, rho=rho,
                       train_rho=train_rho).to(qkv)  # fmt: skip
            with torch.no_grad():
                new.wqkv.weight.copy_(qkv), new.wo.weight.copy_(out)
                for bias, given in ((new.wqkv.bias, qkv_bias), (new.wo.bias, out_bias)):
                    if given is not None:
                        bias.copy_(given)
            new.dropout = _dropout(child)
            new.train(child.training)
            setattr(parent, name, InTorch(new, child.batch_first) if isinstance(child, nn.MultiheadAttention) else new)
            found += 1
    if not found:
        raise ValueError(f"model must have some attention to convert, {type(model).__name__} has none that is known")
    return found


def _projections(module: Any) -> tuple[int, Tensor, Tensor | None, Tensor, Tensor | None] | None:
    """Heads, the rows q|k|v and their bias, and the output's weight and bias; None if it is no attention we know."""
    if isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim:
        out = module.out_proj
        return module.num_heads, module.in_proj_weight, module.in_proj_bias, out.weight, out.bias
    if type(module) is MultiHead and module.kv_heads == module.heads and module.position is None:
        if module.head_dim * module.heads == module.dim and not module.causal:
            return module.heads, module.wqkv.weight, module.wqkv.bias, module.wo.weight, module.wo.bias
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    if isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(getattr(module, "num_heads", 0), int):
        if qkv.out_features == 3 * qkv.in_features == 3 * proj.out_features:
            return module.num_heads, qkv.weight, qkv.bias, proj.weight, proj.bias
    return None


def _dropout(module: Any) -> float:
    drop = getattr(module, "attn_drop", getattr(module, "dropout", 0.0))
    return float(getattr(drop, "p", drop))
