"""Diffusion transformers: sizes of the released models, and how they begin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnlab.models.diffusion.dit import SIZES, DiT, sine_table
from attnlab.nn.softmax.mixture_of_heads import MixtureOfHeads
from attnlab.recipes.moh import balanced


def tiny(**keywords) -> DiT:
    torch.manual_seed(0)
    return DiT(size=8, dim=24, depth=2, heads=6, classes=5, mlp_ratio=2.0, **keywords)


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 4, 8, 8), torch.rand(batch) * 1000, torch.randint(5, (batch,))


@pytest.mark.parametrize(
    ("letter", "millions"), [("s", 33.0), ("b", 130.6), ("l", 458.5), ("xl", 675.7)]
)  # measured with the authors' code
def test_sizes_are_the_authors(letter: str, millions: float) -> None:
    for share in (90, 75):
        with torch.device("meta"):
            model = DiT(**SIZES[f"moh_dit_{letter}2_{share}"].arguments)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_predicts_nothing_at_first_and_its_blocks_change_nothing() -> None:
    model = tiny(shared=[2, 6], routed=[2, 0]).eval()
    x, t, y = inputs()
    assert not model(x, t, y).any() and model(x, t, y).shape == (2, 8, 8, 8)
    tokens = torch.randn(2, 16, 24)
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 24)), tokens)


def test_every_parameter_learns_and_the_balance_loss_is_found() -> None:
    model = tiny(shared=[2, 6], routed=[2, 0])
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    with balanced(model) as balance:
        (model(*inputs(8)).pow(2).mean() + 0.01 * balance.loss()).backward()
    assert len(balance.losses) == 1
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert not model.positions.requires_grad


def test_labels_are_dropped_in_training_alone() -> None:
    model = tiny(drop_class=1.0)
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.modulation.weight)
    x, t, y = inputs()
    none = torch.full_like(y, 5)
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, none))
    assert not torch.equal(model.eval()(x, t, y), model.eval()(x, t, none))


def test_plain_attention_where_no_heads_are_routed_and_one_choice_per_block() -> None:
    assert not any(isinstance(m, MixtureOfHeads) for m in tiny().modules())
    mixed = tiny(shared=[2, None], routed=[2, None])
    assert [type(b.attention) is MixtureOfHeads for b in mixed.blocks] == [True, False]


def test_positions_differ_and_rows_come_second() -> None:
    table = sine_table(3, 8)
    assert len(torch.unique(table, dim=0)) == 9
    assert torch.equal(table[0, :4], table[3, :4]) and torch.equal(table[0, 4:], table[1, 4:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiT(size=9), "size must be a multiple of patch = 2"),
        (lambda: DiT(dim=30), "dim must be a multiple of 4"),
        (lambda: tiny(shared=[1, 2, 3], routed=1), "shared must be one or one for each of 2 blocks"),
        (lambda: tiny()(torch.randn(2, 4, 6, 6), *inputs()[1:]), "x must be"),
        (lambda: tiny()(inputs()[0], *inputs(3)[1:]), "t and y must be"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
