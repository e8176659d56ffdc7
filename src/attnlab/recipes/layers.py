"""Other attention in a trained model: its layers replaced by ones that take their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

from attnlab.models.skeletons.plain import Plain, TokenBlock
from attnlab.nn.multihead import MultiHead

M = TypeVar("M", bound=MultiHead)


def attention_layers(model: nn.Module, kind: type[M]) -> Iterator[tuple[nn.Module, str, M]]:
    """Each layer of `model` that is a `kind`, and no relative of it, with its parent and its name there."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is kind
    ]
    if not found:
        raise ValueError(f"model has no {kind.__name__} attention to replace: {type(model).__name__}")
    yield from found


def plain_blocks(backbone: nn.Module) -> list[TokenBlock]:
    """The blocks of a vision transformer whose softmax attention can be taken apart: project, attend, merge.

    Raises unless it is a `Plain` network with a class token and a classifier, whose mixers are `MultiHead` or differ
    from it only in what they do to their heads.
    """
    if not isinstance(backbone, Plain) or backbone.class_token is None:
        raise TypeError("backbone must be a Plain network with a class token")
    blocks = [cast(TokenBlock, block) for block in backbone.encoder.blocks]
    for block in blocks:
        mixer = block.mixer
        plain = isinstance(mixer, MultiHead) and all(
            getattr(type(mixer), name) is getattr(MultiHead, name) for name in ("forward", "project", "mix")
        )
        if not plain or mixer.position is not None:
            raise TypeError(f"backbone must mix by MultiHead without positions of its own, got {type(mixer).__name__}")
    if not isinstance(backbone.head, nn.Linear):
        raise ValueError("backbone must have a classifier: num_classes of at least 1")
    return blocks


def replace_attention(
    model: nn.Module, by: type[MultiHead], *, of: type[MultiHead] = MultiHead, **options: Any
) -> nn.Module:
    """Every layer of `model` that is an `of` becomes a `by` with the same weights and positions, in place.

    Both have the weights of `MultiHead` and no others; `options` are the new layers' own. Returns the model, or the new
    layer if `model` is one.
    """
    if type(model) is of:
        return _like(model, by, options)
    for parent, name, child in attention_layers(model, of):
        setattr(parent, name, _like(child, by, options))
    return model


def _like(old: MultiHead, by: type[MultiHead], options: dict[str, Any]) -> MultiHead:
    with torch.device("meta"):  # its weights are thrown away
        new = by(
            old.dim, heads=old.heads, kv_heads=old.kv_heads, head_dim=old.head_dim, causal=old.causal,
            position=old.position, **{"dropout": old.dropout, **options},
        )  # fmt: skip
    new.wqkv, new.wo, new.q_norm, new.k_norm = old.wqkv, old.wo, old.q_norm, old.k_norm
    if left := [name for name, p in new.named_parameters() if p.is_meta]:
        raise ValueError(f"by must have no weights of its own, got {by.__name__} with {', '.join(left)}")
    return new.train(old.training)
