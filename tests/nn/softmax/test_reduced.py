"""Reduced attention: what each matrix that is left out does and does not change; the network without MLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnlab.models.vision.minimal import MinimalTransformer, account, overdetermination
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.reduced import ReducedAttention

SYMMETRIC = [("shared", 1), ("shared", 4), ("mirrored", 1), ("cholesky", 1)]


def tokens(n: int = 9, dim: int = 16) -> torch.Tensor:
    return torch.randn(2, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def reduced(similarity: str, values: str = "none", **options) -> ReducedAttention:
    torch.manual_seed(1)
    return ReducedAttention(16, similarity=similarity, values=values, **options).double()


def scores(module: ReducedAttention, x: torch.Tensor) -> torch.Tensor:
    q, k, _ = module.qkv(x)
    return q @ k.mT


@pytest.mark.parametrize("causal", [False, True])
def test_one_matrix_for_queries_and_keys_and_one_for_values_do_what_four_did(causal):
    trained, x = MultiHead(16, heads=1, causal=causal).double(), tokens()
    merged = ReducedAttention.merged_from(trained)
    torch.testing.assert_close(merged(x), trained(x), rtol=1e-10, atol=1e-12)
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (merged, trained))
    assert 2 * ours == theirs


def test_minimum_equals_the_equations_written_out():
    module, x = reduced("collapsed"), tokens()
    for b in range(2):
        # y_i = Σ_j softmax_j(x_i W x_j / √C) x_j; a linear layer holds W transposed.
        weights = torch.exp(x[b] @ module.ws.T @ x[b].T / 16**0.5)
        wanted = (weights / weights.sum(1, keepdim=True)) @ x[b]
        torch.testing.assert_close(module(x)[b], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("similarity", "heads"), SYMMETRIC)
def test_symmetric_scores_equal_their_transpose(similarity, heads):
    found = scores(reduced(similarity, heads=heads), tokens())
    torch.testing.assert_close(found, found.mT)


@pytest.mark.parametrize(("similarity", "heads"), [("shared", 4), ("cholesky", 1)])
def test_no_token_repels_itself_where_the_form_is_a_square(similarity, heads):
    found = scores(reduced(similarity, heads=heads), tokens(40))
    assert (found.diagonal(dim1=-2, dim2=-1) >= 0).all()
    assert torch.linalg.eigvalsh(found).min() > -1e-9


def test_a_mirrored_matrix_lets_tokens_repel_themselves():
    assert (scores(reduced("mirrored"), tokens(40)).diagonal(dim1=-2, dim2=-1) < 0).any()


def test_cholesky_reaches_what_a_shared_matrix_does():
    shared, cholesky, x = reduced("shared"), reduced("cholesky"), tokens()
    square = shared.ws.mT @ shared.ws
    factor = torch.linalg.cholesky(square)
    rows, columns = torch.tril_indices(16, 16)
    with torch.no_grad():
        cholesky.ws.copy_(factor[rows, columns])
    torch.testing.assert_close(cholesky(x), shared(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("similarity", ["full", "collapsed", "shared", "mirrored", "cholesky"])
def test_without_value_matrices_outputs_are_means_of_inputs(similarity):
    module, x = reduced(similarity), tokens()
    weights = module.weights(x)[:, 0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9, dtype=torch.float64))
    assert (weights >= 0).all()
    torch.testing.assert_close(module(x), weights @ x)
    assert (module(x).amax(1) <= x.amax(1)).all() and (module(x).amin(1) >= x.amin(1)).all()


@pytest.mark.parametrize(
    ("similarity", "values", "entries"),
    [("full", "full", 4 * 256), ("full", "none", 2 * 256), ("collapsed", "full", 3 * 256), ("shared", "full", 3 * 256),
     ("collapsed", "merged", 2 * 256), ("collapsed", "none", 256), ("mirrored", "none", 136),
     ("cholesky", "none", 136)],
)  # fmt: skip
def test_parameters_are_as_the_table_says(similarity, values, entries):
    assert sum(p.numel() for p in reduced(similarity, values).parameters()) == entries


@pytest.mark.parametrize("similarity", ["full", "collapsed", "mirrored", "cholesky"])
@pytest.mark.parametrize("values", ["full", "none"])
def test_every_variant_streams_and_is_causal(similarity, values):
    module, x = reduced(similarity, values, causal=True), tokens()
    state, pieces = module.initial_state(2), []
    for piece in x.split([4, 1, 4], 1):
        y, state = module(piece, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), module(x))


def test_a_network_without_mlp_is_residual_attention_alone():
    net = MinimalTransformer(dim=16, depth=2, image=8, patch=2, in_channels=1, num_classes=10)
    x = net.embed(torch.randn(2, 1, 8, 8))[0]
    y = x
    for block in net.encoder.blocks:
        y = y + block.mixer(block.norm1(y))
    torch.testing.assert_close(net.encoder(x), net.encoder.norm(y))
    assert not any("mlp" in n or "norm2" in n for n, _ in net.named_parameters())


@pytest.mark.parametrize("dim", [32, 64])
def test_the_account_agrees_with_the_formulas(dim):
    shape = dict(dim=dim, depth=6, image=8, patch=2, in_channels=1, num_classes=10)
    rest = (4 * dim + dim) + 16 * dim + 6 * 2 * dim + 2 * dim + 10 * dim + 10
    full = MinimalTransformer(mlp=True, similarity="full", values="full", heads=4, **shape)
    norms = 6 * 2 * dim
    square = 6 * dim * dim
    assert account(full) == {
        "similarity": 2 * square, "values": 2 * square, "mlp": 6 * (8 * dim * dim + 5 * dim), "rest": rest + norms,
    }  # fmt: skip
    assert account(MinimalTransformer(**shape)) == {"similarity": square, "values": 0, "mlp": 0, "rest": rest}
    total = sum(account(full).values())
    assert total == sum(p.numel() for p in full.parameters())
    # The paper: symmetric without MLP about a quarter of the full layer, the minimum below a tenth.
    symmetric = account(MinimalTransformer(similarity="shared", values="full", heads=4, **shape))
    layers = {k: sum(v for n, v in a.items() if n != "rest") for k, a in (("s", symmetric), ("f", account(full)))}
    assert layers["s"] / layers["f"] == pytest.approx(0.25, abs=0.01)
    assert 6 * dim * dim / layers["f"] < 0.1


def test_overdetermination_counts_numbers_to_fit_per_parameter():
    assert overdetermination(60000, 10, 563242) == pytest.approx(1.065, abs=1e-3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="similarity must be one of"):
        ReducedAttention(16, similarity="symmetric")
    with pytest.raises(ValueError, match="values must be one of"):
        ReducedAttention(16, values="no")
    with pytest.raises(ValueError, match="one head"):
        ReducedAttention(16, heads=2)
    with pytest.raises(ValueError, match="bias"):
        ReducedAttention(16, bias=True)
    with pytest.raises(ValueError, match="one head"):
        ReducedAttention.merged_from(MultiHead(16, heads=2))
    with pytest.raises(ValueError, match="norms"):
        ReducedAttention.merged_from(MultiHead(16, heads=1, qk_norm=nn.RMSNorm))
    with pytest.raises(ValueError, match="positive"):
        overdetermination(0, 1, 1)
