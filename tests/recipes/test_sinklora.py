"""SinkLoRA's recipe: what is trained, what is left alone, and what comes back at the end."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.mixture_of_heads import MixtureOfHeads
from attnlab.nn.sparse.heavy_hitters import HeavyHitters
from attnlab.nn.sparse.shifted_groups import ShiftedGroups
from attnlab.recipes.layers import replace_attention
from attnlab.recipes.sinklora import LONGALPACA_PLUS, LowRank, finetune, finish, generate, prepare


def model(**keywords) -> Decoder:
    torch.manual_seed(0)
    return Decoder(**{"vocabulary": 11, "dim": 16, "depth": 2, "heads": 4, "kv_heads": 2, **keywords}).eval()


def texts(n: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 11, (count, n), generator=torch.Generator().manual_seed(1))


def test_at_first_nothing_changes_but_what_is_seen() -> None:
    full, ids = model(), texts()
    wanted = full(ids)
    prepare(full, groups=dict(group=64))  # one group holds the whole text
    torch.testing.assert_close(full(ids), wanted)
    assert (prepare(model())(ids) - wanted)[:, 16:].abs().max() > 1e-4


def test_trained_are_low_rank_updates_embeddings_and_norms_and_no_other_weight() -> None:
    m = prepare(model(), rank=3)
    trained = {n for n, p in m.named_parameters() if p.requires_grad}
    assert {n.split(".")[-1] for n in trained - {"embedding.weight"}} == {"weight", "0", "1", "2"}
    kinds = ("lowrank", "norm", "embedding", "parametrizations.weight.0")
    assert all(any(kind in n for kind in kinds) for n in trained)
    assert not any(n.endswith("original") or ".mlp." in n or n == "head.weight" for n in trained)
    # q, k, v and the output: rank (C + rows) each; norms: two of each block and the last; the embedding.
    updates = 3 * ((16 + 16) + 2 * (16 + 8) + (16 + 16))
    count = sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert count == 2 * updates + 5 * 16 + 11 * 16
    before = {n: p.clone() for n, p in m.named_parameters()}
    finetune(m, [texts()] * 3, rate=1e-2, warm_up=1)
    moved = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained


def test_the_end_is_the_same_weights_merged_under_full_attention() -> None:
    m, ids = prepare(model(), factor=2.0), texts()
    finetune(m, [ids] * 4, rate=1e-2, warm_up=2)
    replace_attention(m, MultiHead, of=ShiftedGroups)
    wanted = m.eval()(ids)  # updates apart, full attention
    replace_attention(m, ShiftedGroups)
    finish(m)
    assert all(type(block.mixer) is MultiHead for block in m.blocks)
    assert not any(parametrize.is_parametrized(module) for module in m.modules())
    assert all(p.requires_grad for p in m.parameters())
    torch.testing.assert_close(m(ids), wanted)
    assert m.blocks[0].mixer.position is m.blocks[1].mixer.position


def test_positions_are_interpolated() -> None:
    near, far = model().blocks[0].mixer.position, prepare(model(), factor=4.0).blocks[0].mixer.position
    x = torch.randn(1, 1, 8, 4)
    torch.testing.assert_close(far.turn_to(x, 4 * torch.arange(8)), near.turn(x))


def test_the_loss_falls_and_the_rate_warms_up_to_a_constant() -> None:
    m = prepare(model(), rank=4)
    losses = finetune(m, [texts(32, 4)] * 40, rate=1e-2, warm_up=5)
    assert len(losses) == 40 and losses[-1] < losses[0] - 0.2
    steps, weight = [], nn.Parameter(torch.zeros(1))

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

    def loss(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        steps.append(weight.item())
        return module.weight.sum()

    finetune(One(), [texts()] * 8, rate=0.1, warm_up=4, loss=loss)
    moves = [a - b for a, b in pairwise(steps)]  # Adam moves by the rate where gradients are equal
    assert moves == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1], rel=1e-4)


def test_an_update_of_stretches_is_an_update_of_each_alone() -> None:
    weight = torch.randn(10, 6)
    update = LowRank(weight, (4, 6), rank=2, alpha=6.0)
    for b in update.b:
        nn.init.normal_(b)
    wanted = torch.cat([weight[:4] + 3.0 * update.b[0] @ update.a[0], weight[4:] + 3.0 * update.b[1] @ update.a[1]])
    torch.testing.assert_close(update(weight), wanted)


def test_generation_drops_nothing_with_room_for_everything_and_leaves_the_model_alone() -> None:
    m, ids = model(), texts(12)
    mixers = [block.mixer for block in m.blocks]
    wanted = m.generate(ids, 10, temperature=0)
    assert torch.equal(generate(m, ids, 10, heavy=11, recent=11, temperature=0), wanted)
    assert [block.mixer for block in m.blocks] == mixers
    # The first token after the prompt has seen all of it, however small the cache.
    assert torch.equal(generate(m, ids, 1, heavy=1, recent=1, temperature=0), wanted[:, :13])


def test_generation_keeps_its_budget() -> None:
    m, sizes = model(), []
    original = HeavyHitters.forward

    def watch(self, x, **keywords):
        y, state = original(self, x, **keywords)
        sizes.append(state.k.shape[2])
        return y, state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeavyHitters, "forward", watch)
        generate(m, texts(12), 6, heavy=3, recent=2, temperature=0)
    assert set(sizes) == {5}


def test_the_shares_of_the_training_data_are_whole() -> None:
    assert sum(LONGALPACA_PLUS.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda: prepare(model(), factor=0.5), "factor must be at least 1"),
    (lambda: prepare(model(position="alibi"), factor=2.0), "factor must be 1 for a model without plain rotary"),
    (lambda: prepare(model(), rank=0), "rank must be at least 1"),
    (lambda: prepare(nn.Sequential(nn.Linear(3, 3))), "model has no MultiHead attention to replace"),
    (lambda: prepare(nn.Sequential(MultiHead(8, heads=2))), "model must be causal"),
    (lambda: finish(model()), "model has no ShiftedGroups attention to replace"),
    (lambda: finetune(model(), [], warm_up=-1), "warm_up must be 0 or more"),
    (lambda: LowRank(torch.zeros(4, 4), (1, 2), rank=1, alpha=1.0), "rows must sum to the weight's 4"),
    (lambda: replace_attention(model(), MixtureOfHeads, shared=1, routed=1), "by must have no weights of its own"),
])  # fmt: skip
def test_errors_name_what_is_wrong(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
