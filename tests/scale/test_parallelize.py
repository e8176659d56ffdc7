"""Whole models over simulated ranks: equal to one process, in less memory; what cannot be spread is refused."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attnlab import scale
from attnlab.models.skeletons.decoder import Decoder
from attnlab.patterns import Causal
from attnlab.scale import Layout, gradients, simulate

IDS = torch.randint(50, (2, 37), generator=torch.Generator().manual_seed(0))


def decoder(**options) -> Decoder:
    return Decoder(**{**dict(vocabulary=50, dim=32, depth=2, heads=4), **options}).double()


def whole(model, ids=IDS):
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def spread(model, ranks: int, ids=IDS, **options):
    """Loss and gradients of each rank."""

    def rank(wire):
        mine = copy.deepcopy(model)
        mine.zero_grad()
        parallel = scale.parallelize(mine, wire, **options)
        loss = parallel.loss(parallel(ids), ids)
        loss.backward()
        parallel.average_gradients()
        return loss.detach(), [p.grad for p in mine.parameters()]

    return simulate(ranks, rank)


@pytest.mark.parametrize(
    "options",
    [
        dict(kv_heads=2),
        dict(position="alibi"),
        dict(position="learned", length=100),
        dict(mixer="gated"),
        dict(mixer="power"),
        dict(mixer=["kda", "linear"]),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_loss_and_gradients_are_those_of_one_process(options) -> None:
    model = decoder(**options)
    loss, grads = whole(copy.deepcopy(model))
    for found, gradients_found in spread(model, 3):
        assert abs(found - loss) < 1e-10
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(gradients_found, grads, strict=True))


@pytest.mark.parametrize(
    ("method", "layout"), [("ulysses", "auto"), ("allgather", "contiguous"), ("ring", "contiguous")]
)
def test_a_hybrid_is_spread_by_every_method(method: str, layout: str) -> None:
    model = decoder(mixer=["linear", "multihead"])
    loss, grads = whole(copy.deepcopy(model))
    for found, gradients_found in spread(model, 2, method=method, layout=layout):
        assert abs(found - loss) < 1e-10
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(gradients_found, grads, strict=True))


def test_a_layout_may_be_computed_from_a_pattern() -> None:
    model = decoder()
    loss, _ = whole(copy.deepcopy(model))
    for found, _ in spread(model, 3, layout=partial(Layout.balanced, Causal(), chunks=4)):
        assert abs(found - loss) < 1e-10


def test_checkpointed_layers_are_spread_too() -> None:
    class Saving(Decoder):
        def forward(self, ids):
            x = self.embedding(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    model = Saving(vocabulary=50, dim=32, depth=2, heads=4).double()
    loss, grads = whole(copy.deepcopy(model))
    for found, gradients_found in spread(model, 2):
        assert abs(found - loss) < 1e-10
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(gradients_found, grads, strict=True))


def test_what_is_kept_for_the_backward_falls_as_one_over_the_ranks() -> None:
    ids = torch.randint(50, (1, 256), generator=torch.Generator().manual_seed(0))

    def kept(wire, mixer):
        model = decoder(mixer=mixer)
        parallel = scale.parallelize(model, wire, check=False, layout="contiguous")
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        bytes_kept: dict[int, int] = {}

        def note(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                bytes_kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = parallel.loss(parallel(ids), ids)
        loss.backward()
        return sum(bytes_kept.values())

    for mixer in ("multihead", "linear"):
        one = simulate(1, lambda wire, mixer=mixer: kept(wire, mixer))[0]
        for most in (max(simulate(4, lambda wire, mixer=mixer: kept(wire, mixer))),):
            # States of scans and tables of positions are what does not shrink.
            assert most < 0.3 * one, (mixer, most / one)


def test_the_model_is_given_back_as_it_was() -> None:
    model = decoder(mixer=["kda", "multihead"])
    before = model(IDS)

    def rank(wire):
        mine = copy.deepcopy(model)
        parallel = scale.parallelize(mine, wire)
        parallel(IDS)
        with pytest.raises(ValueError, match="already"):
            scale.parallelize(mine, wire)
        parallel.close()
        return mine(IDS).detach()

    assert all(torch.equal(found, before) for found in simulate(1, rank))


def refused(make, **options) -> str:
    with pytest.raises(ValueError) as caught:
        simulate(2, lambda wire: scale.parallelize(make(), wire, **options))
    return str(caught.value)


def test_what_mixes_tokens_otherwise_is_refused() -> None:
    assert "mixes tokens" in refused(lambda: decoder(mixer=["mamba", "multihead"]))
    assert "neither is spread" in refused(lambda: decoder(mixer="sigmoid"))
    assert "multiple of the 2 ranks" in refused(lambda: decoder(heads=3, dim=33 - 3, head_dim=10), method="ulysses")
    assert "method" in refused(decoder, method="star")
    assert "layout" in refused(decoder, layout="spiral")

    def padded(wire):
        parallel = scale.parallelize(decoder(), wire)
        parallel(IDS.float())

    with pytest.raises(ValueError, match="ids must be integers"):
        simulate(1, padded)


def test_without_the_fused_kernel_gradients_are_the_same(monkeypatch) -> None:
    """Off the CPU, blocks are computed again by attend."""
    q, k, v, w = torch.randn(4, 2, 2, 40, 8, dtype=torch.float64)
    layout = Layout.zigzag(40, 2)

    def rank(wire):
        mine = [layout.shard(x, wire.rank).clone().requires_grad_() for x in (q, k, v)]
        out, lse = scale.attend(*mine, mesh=wire, layout=layout, pattern=Causal(), return_lse=True)
        ((out * layout.shard(w, wire.rank)).sum() + lse.sin().sum()).backward()
        return [x.grad for x in mine]

    wanted = simulate(2, rank)
    monkeypatch.setattr(gradients, "_fused", lambda rows, *given: gradients._again(rows, *given, False)[:3])
    for ours, theirs in zip(simulate(2, rank), wanted, strict=True):
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, theirs, strict=True))
