"""Mixture of heads in training: the balance of its heads, and a trained model turned into one (arXiv 2410.11842)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.mixture_of_heads import HeadRouter, MixtureOfHeads


class Balance:
    """The balance losses of the layers that ran inside `balanced`."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def loss(self) -> Tensor:
        """Their mean over the layers that route: a scalar, to be added to the task's at a weight such as 0.01."""
        if not self.losses:
            raise ValueError("no layer with routed heads ran: call the model inside `balanced(model)`")
        return torch.stack(self.losses).mean()


@contextmanager
def balanced(model: nn.Module) -> Iterator[Balance]:
    """Collects the balance loss of every layer of `model` that routes heads, while it runs inside the context.

        with balanced(model) as balance:
            loss = task(model(x)) + 0.01 * balance.loss()

    Costs one more product with the router's weights per layer. Source: arXiv 2410.11842.
    """
    balance = Balance()

    def collect(router: HeadRouter, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        balance.losses.append(router.balance(arguments[0]))

    routers = [m for m in model.modules() if isinstance(m, HeadRouter) and m.routed]
    hooks = [m.register_forward_hook(collect) for m in routers]
    try:
        yield balance
    finally:
        for hook in hooks:
            hook.remove()


def convert(
    model: nn.Module,
    *,
    shared: int | None = None,
    routed: int | None = None,
    select: Literal["learned", "query_norm"] = "query_norm",
    straight_through: bool = True,
) -> nn.Module:
    """Turns the attention of a trained model into a mixture of heads, in place; weights are kept and shared.

    Every `MultiHead` in `model` (not its relatives) becomes a `MixtureOfHeads` of the same q, k, v and output weights.
    With `select="query_norm"` there is nothing new to learn, as in MoH-LLaMA3; with "learned" the router begins at
    zero, where every picked head counts in full. Returns the model (the mixture, if `model` is one such layer).
    Source: arXiv 2410.11842.
    """
    options: dict[str, Any] = dict(shared=shared, routed=routed, select=select)
    if type(model) is MultiHead:
        return _mixture(model, options, straight_through)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is MultiHead
    ]
    if not found:
        raise ValueError(f"model has no MultiHead attention to convert: {type(model).__name__}")
    for parent, name, child in found:
        setattr(parent, name, _mixture(child, options, straight_through))
    return model


def _mixture(old: MultiHead, options: dict[str, Any], straight_through: bool) -> MixtureOfHeads:
    straight_through = straight_through and options["select"] == "query_norm"
    if options["select"] == "query_norm" and not isinstance(old.q_norm, nn.Identity):
        raise ValueError("select must be 'learned' for a model that norms its queries: they are all equally long")
    new = MixtureOfHeads(
        old.dim, heads=old.heads, kv_heads=old.kv_heads, head_dim=old.head_dim, causal=old.causal,
        position=old.position, dropout=old.dropout, straight_through=straight_through, **options,
    )  # fmt: skip
    new.wqkv, new.wo, new.q_norm, new.k_norm = old.wqkv, old.wo, old.q_norm, old.k_norm
    if new.router is not None:
        new.router = new.router.to(old.wo.weight)
        nn.init.zeros_(new.router.weight)
    return new.train(old.training)
