"""Ablate, patch, scale, hide and point: each equals the same done by hand, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from attnlab import attend
from attnlab.lens.edits.heads import Ablate, LookAt, MaskKeys, Patch, Scale, at_heads
from attnlab.lens.steer import steer
from attnlab.lens.watch import watch
from attnlab.models.skeletons.decoder import Decoder
from attnlab.patterns import Causal, Explicit

IDS = torch.arange(18).view(2, 9) % 11


def decoder(kv_heads: int = 4) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(vocabulary=11, dim=24, depth=2, heads=4, kv_heads=kv_heads, hidden=32).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def by_hand(model: Decoder, layer: int, change) -> torch.Tensor:
    """The logits when `change` of the heads' outputs (B, N, H, D) is what the output projection gets."""
    hook = model.blocks[layer].mixer.wo.register_forward_pre_hook(
        lambda _, given: change(given[0].unflatten(-1, (4, 6)).clone()).flatten(-2)
    )
    try:
        return model(IDS)
    finally:
        hook.remove()


def edited(model: Decoder, edit) -> torch.Tensor:
    before = model(IDS)
    with steer(model, [edit] if not isinstance(edit, list) else edit):
        after = model(IDS)
    assert torch.equal(model(IDS), before)
    return after


def test_a_zeroed_head_says_nothing() -> None:
    model = decoder()

    def change(z):
        z[:, 3:5, [1, 2]] = 0
        return z

    assert torch.equal(edited(model, Ablate(layers=1, heads=[1, 2], queries=slice(3, 5))), by_hand(model, 1, change))


def test_the_mean_is_over_the_batch_and_the_chosen_queries() -> None:
    model = decoder()

    def change(z):
        z[:, 2:, 3] = z[:, 2:, 3].mean((0, 1))
        return z

    wanted = by_hand(model, 0, change)
    torch.testing.assert_close(edited(model, Ablate("mean", layers=0, heads=3, queries=slice(2, None))), wanted)


def test_a_mean_that_is_given_is_taken() -> None:
    model, mean = decoder(), torch.randn(4, 6, dtype=torch.float64)

    def change(z):
        z[:, :, 0] = mean[0]
        return z

    wanted = by_hand(model, 1, change)
    torch.testing.assert_close(edited(model, Ablate("mean", mean={1: mean}, layers=1, heads=0)), wanted)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_uniform_is_the_plain_average_of_what_may_be_seen(kv_heads: int) -> None:
    model = decoder(kv_heads)
    mixer = model.blocks[0].mixer
    with watch(model, keep=lambda e, out: e.v.detach()) as record:
        model(IDS)
    v = record[0].repeat_interleave(4 // kv_heads, 1)
    average = v.cumsum(2) / torch.arange(1, 10).view(-1, 1)

    def change(z):
        z[:, :, 2] = average[:, 2]
        return z

    assert mixer.kv_heads == kv_heads
    torch.testing.assert_close(edited(model, Ablate("uniform", layers=0, heads=2)), by_hand(model, 0, change))


def test_patching_all_of_another_run_gives_its_attention() -> None:
    model, other = decoder(), IDS.flip(1)
    with watch(model, keep="outputs") as record:
        model(other)
    with watch(model, keep="outputs") as patched, steer(model, [Patch(record, heads=[0, 3])]):
        model(IDS)
    assert torch.equal(patched[1][:, [0, 3]], record[1][:, [0, 3]])
    assert not torch.allclose(patched[1][:, 1], record[1][:, 1])
    wanted = edited(model, Patch({1: record[1]}))
    assert torch.equal(edited(model, Patch({1: record[1]}, layers=1)), wanted)
    one = Patch({0: record[0][:1]}, layers=0, queries=-1)
    assert edited(model, one).shape == wanted.shape


def test_a_scale_of_one_changes_no_bit_and_a_head_scales_alone() -> None:
    model = decoder()
    assert torch.equal(edited(model, Scale(1.0)), model(IDS))
    assert torch.equal(edited(model, Scale(0.0, layers=0, heads=1)), edited(model, Ablate(layers=0, heads=1)))
    each = torch.tensor([1.0, 3.0, 1.0, 0.5])

    def change(z):
        return z * each[:, None].double()

    assert torch.equal(edited(model, Scale(each, layers=1)), by_hand(model, 1, change))


def test_hidden_keys_give_their_weight_to_the_others() -> None:
    model = decoder()
    with watch(model, layers=0, keep=lambda e, out: torch.stack((e.q, e.k, e.v)).detach()) as record:
        model(IDS)
    q, k, v = record[0]
    seen = torch.ones(9, 9, dtype=torch.bool)
    seen[4:, [0, 2]] = False
    wanted = attend(q, k, v, pattern=Causal() & Explicit(seen))
    with watch(model, layers=0, keep="outputs") as record, steer(model, MaskKeys([0, 2], queries=slice(4, None))):
        model(IDS)
    torch.testing.assert_close(record[0], wanted)
    with pytest.raises(ValueError, match="hides every key"):
        edited(model, MaskKeys(slice(None)))


def test_a_head_looks_where_it_is_pointed() -> None:
    model = decoder()
    targets = torch.tensor([[1, 4], [6, -1]])
    as_mask = torch.zeros(2, 9, dtype=torch.bool)
    as_mask[0, [1, 4]] = as_mask[1, 6] = True
    with watch(model, keep="weights") as record, steer(model, LookAt(targets, layers=1, heads=3)):
        model(IDS)
    wanted = as_mask / as_mask.sum(1, keepdim=True)
    torch.testing.assert_close(record[1][:, 3, -1], wanted.double())
    torch.testing.assert_close(record[1].sum(-1), torch.ones(2, 4, 9).double())
    assert torch.equal(edited(model, LookAt(targets)), edited(model, LookAt(as_mask)))


def test_pairs_of_layers_and_heads_are_one_edit_for_each_layer() -> None:
    model = decoder()
    both = edited(model, [Ablate(layers=0, heads=[2, 3]), Ablate(layers=1, heads=1)])
    assert torch.equal(edited(model, at_heads(Ablate, [(0, 2), (1, 1), (0, 3)])), both)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Ablate("median"), "how must be"),
        (lambda: Ablate("zero", mean={}), "mean goes with"),
        (lambda: Scale(torch.ones(2, 2)), "factor must be"),
        (lambda: MaskKeys(None), "keys must say"),
        (lambda: LookAt(torch.ones(3)), "targets must have shape"),
        (lambda: LookAt(torch.tensor([[-1, -1]])), "at least one token"),
    ],
)
def test_what_means_nothing_is_refused(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (Ablate(layers=7), "7"),
        (Ablate(layers=0, heads=4), "4 not there"),
        (Scale(torch.ones(3)), "each of 4 heads"),
        (Ablate("mean", mean={1: torch.zeros(4, 6)}), "no layer 0"),
        (Patch({0: torch.zeros(2, 4, 8, 6)}), "outputs of layer 0"),
        (Patch({0: torch.zeros(2, 4, 9, 6)}, layers=1), "no layer 1"),
        (LookAt(torch.tensor([[12], [1]])), "there are 9 keys"),
    ],
)
def test_what_does_not_fit_the_model_is_said(edit, match: str) -> None:
    model = decoder()
    before = model(IDS)
    with pytest.raises(ValueError, match=match), steer(model, [edit]):
        model(IDS)
    assert torch.equal(model(IDS), before)
