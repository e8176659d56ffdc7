"""Each sequence mixer is its explicit matrix times what it mixes, and what the report says of it is so."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnlab import scale
from attnlab.cost import count_flops, fit_growth
from attnlab.patterns import Causal
from attnlab.scale import Layout
from attnlab.scale.unified import MIXERS, StateSpace, mixer, report

L, D = 48, 6


@pytest.mark.parametrize("name", MIXERS)
def test_the_fast_form_is_the_matrix_times_its_inputs(name: str) -> None:
    one, x = mixer(name, D, L).double(), torch.randn(2, L, D, dtype=torch.float64)
    assert (one(x) - one.explicit(x)).abs().max() < 1e-6 * one(x).abs().max()
    assert one.matrix(x).shape[-2:] == (L, L)


@pytest.mark.parametrize("name", MIXERS)
def test_the_report_says_what_is_measured(name: str) -> None:
    one = mixer(name, D, L).double()
    x, y = torch.randn(2, 1, L, D, dtype=torch.float64)
    traits = one.traits
    assert traits.data_dependent == (not torch.equal(one.matrix(x), one.matrix(y)))
    order = torch.randperm(L)
    moved = (one(x[:, order]) - one(x)[:, order]).abs().max() > 1e-8
    assert traits.positional == bool(moved)
    if traits.train in ("L", "L²"):  # transforms are not counted as products
        lengths = [512, 1024, 2048]
        flops = [count_flops(mixer(name, D, n), torch.randn(1, n, D)) for n in lengths]
        # What is linear in L with a constant, projections and short matrices, ends a little off.
        assert abs(fit_growth(lengths, flops) - len(traits.train)) < 0.2, flops


def test_fourier_is_numpys_transform_of_both_axes_whose_real_part_is_taken_last() -> None:
    x = torch.randn(2, L, D, dtype=torch.float64)
    wanted = np.fft.fft(np.fft.fft(x.numpy(), axis=-1), axis=-2).real
    assert np.abs(mixer("fourier", D, L)(x).numpy() - wanted).max() < 1e-9


def test_fourier_is_that_of_transformers(transformers) -> None:
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    config = transformers.FNetConfig(hidden_size=D, use_tpu_fourier_optimizations=False)
    x = torch.randn(2, L, D)
    theirs = FNetBasicFourierTransform(config)(x)[0]
    assert torch.allclose(mixer("fourier", D, L)(x), theirs, atol=1e-4)


def test_a_state_space_is_its_recurrence() -> None:
    one, x = StateSpace(D, L).double(), torch.randn(2, L, D, dtype=torch.float64)
    assert (one(x) - one.recurrence(x)).abs().max() < 1e-9


def test_a_landmark_for_every_token_is_softmax_attention() -> None:
    one, x = mixer("nystrom", 16, 12, landmarks=12).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    scores = one.wq(x) @ one.wk(x).mT * 16**-0.5
    assert (one(x) - scores.softmax(-1) @ one.wv(x)).abs().max() < 1e-5


def test_the_report_has_a_row_for_each_mixer() -> None:
    rows = report()
    assert len(rows) == 1 + len(MIXERS) and all(len(row) == len(rows[0]) for row in rows)
    with pytest.raises(ValueError, match="name must be one of"):
        mixer("rnn", 4, 4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("split", ["sequence", "heads", "both"])
def test_distributed_attention_is_torchs(split: str, causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 37, 8, dtype=torch.float64, requires_grad=True)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    grads = torch.autograd.grad(wanted.sin().sum(), (q, k, v))
    layout, pattern = Layout.contiguous(37, 4), Causal() if causal else None

    def rank(wire):
        r = wire.rank
        if split == "heads":
            mine = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            out = scale.attend(*mine, mesh=wire, method="heads", pattern=pattern)
            out = out[:, :, layout.positions(r)]
        else:
            mine = [layout.shard(x.detach(), r).clone().requires_grad_() for x in (q, k, v)]
            mesh = (
                wire
                if split == "sequence"
                else (wire.part([r % 2, r % 2 + 2]), wire.part([r // 2 * 2, r // 2 * 2 + 1]))
            )
            method = "ring" if split == "sequence" else "usp"
            out = scale.attend(*mine, mesh=mesh, method=method, layout=layout, pattern=pattern)
        out.sin().sum().backward()
        return out.detach(), [x.grad for x in mine]

    found = scale.simulate(4, rank)
    assert (layout.whole([out for out, _ in found]) - wanted).abs().max() < 1e-10
    for ours, theirs in zip(zip(*(g for _, g in found), strict=True), grads, strict=True):
        whole = torch.stack(ours).sum(0) if split == "heads" else layout.whole(ours)
        assert (whole - theirs).abs().max() < 1e-10
