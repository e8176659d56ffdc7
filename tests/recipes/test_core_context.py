"""Conversion to core-context attention keeps what was trained, and trains what it says."""

from __future__ import annotations

import pytest
import torch

from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.multihead import MultiHead
from attnlab.recipes.core_context import convert, restore, set_context
from attnlab.recipes.sinklora import finetune


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(vocabulary=11, dim=16, depth=2, heads=4, kv_heads=2).eval()


def texts(n: int = 32) -> torch.Tensor:
    return torch.randint(0, 11, (2, n), generator=torch.Generator().manual_seed(1))


def test_texts_within_the_window_read_as_before_and_longer_ones_differ_little() -> None:
    ids = texts()
    wanted = model()(ids)
    torch.testing.assert_close(convert(model(), group=4, window=32)(ids), wanted)
    other = convert(model(), group=4, window=8)
    error = (other(ids) - wanted).abs().max()
    assert 1e-5 < error
    torch.testing.assert_close(set_context(other, group=1, window=8)(ids), wanted)
    torch.testing.assert_close(restore(set_context(other, group=4, window=8))(ids), wanted)
    assert all(type(block.mixer) is MultiHead for block in other.blocks)


@pytest.mark.parametrize("train", ["all", "qkv"])
def test_fine_tuning_moves_the_weights_that_were_named(train: str) -> None:
    m = convert(model(), group=4, window=8, train=train)
    before = {n: p.clone() for n, p in m.named_parameters()}
    losses = finetune(m, [texts()] * 12, rate=1e-2, warm_up=2)
    assert losses[-1] < losses[0]
    moved = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if train == "all" or n.endswith("wqkv.weight")}


def test_a_converted_model_generates_as_it_reads() -> None:
    m, ids = convert(model(), group=4, window=6, train="none"), texts(12)
    assert torch.equal(m.generate(ids, 10, temperature=0), m.generate(ids, 10, temperature=0, cached=False))


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda: convert(model(), train="some"), "train must be 'all', 'qkv' or 'none', got 'some'"),
    (lambda: convert(torch.nn.Linear(2, 2)), "model has no MultiHead attention to replace"),
    (lambda: convert(MultiHead(8, heads=2)), "causal must be True"),
    (lambda: set_context(convert(model()), group=0, window=1), "group must be at least 1, got 0"),
    (lambda: restore(model()), "model has no CoreContext attention to replace"),
])  # fmt: skip
def test_errors_name_what_is_wrong(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
