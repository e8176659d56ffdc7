"""A trained language model with core-context attention: for long texts at a fraction of time and cache."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.core_context import CoreContext
from attnlab.recipes.layers import attention_layers, replace_attention


def convert(
    model: nn.Module,
    *,
    group: int = 16,
    window: int = 1024,
    train: Literal["all", "qkv", "none"] = "all",
    **options: Any,
) -> nn.Module:
    """Turns the causal attention of a trained model into core-context attention of the same weights, in place.

    Texts up to `window` tokens read as before; on longer ones a short fine-tuning adapts the model: the authors take
    1,000 steps at a rate of 2e-5 on long texts (`recipes.sinklora.finetune` does that). Rotary positions that were not
    trained so far need scaling, as without this. Returns the model. Source: arXiv 2412.12465.

    Args:
        group, window: tokens per core, and tokens seen as they are.
        train: "all" weights; "qkv", the projections of queries, keys and values alone, is the paper's partial way, at a
            small loss; "none" freezes the model.
        options: others of `CoreContext`.
    """
    if train not in ("all", "qkv", "none"):
        raise ValueError(f"train must be 'all', 'qkv' or 'none', got {train!r}")
    model = replace_attention(model, CoreContext, group=group, window=window, **options)
    model.requires_grad_(train == "all")
    if train == "qkv":
        for layer in [m for m in model.modules() if isinstance(m, CoreContext)]:
            layer.wqkv.requires_grad_()
    return model


def set_context(model: nn.Module, *, group: int, window: int) -> nn.Module:
    """Other groups and windows for a model that has core-context attention, without training: quality against time."""
    for name, value in (("group", group), ("window", window)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for _, _, layer in attention_layers(model, CoreContext):
        layer.group, layer.window = group, window
    return model


def restore(model: nn.Module) -> nn.Module:
    """Full attention of the same weights again, in place. Returns the model."""
    return replace_attention(model, MultiHead, of=CoreContext)
