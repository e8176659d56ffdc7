"""CHESS: thresholds from calibration, what sparse layers compute, their kernels, and its error beside CATS'."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, linear, silu

from attnlab import build
from attnlab.models.skeletons.decoder import SwiGLU
from attnlab.recipes.chess import (
    SparseLinear,
    SparseSwiGLU,
    Thresholds,
    calibrate,
    chosen_rows,
    quantile,
    sparsify,
    weighted_rows,
)


def model(**options) -> nn.Module:
    torch.manual_seed(0)
    made = build("llama", vocabulary=50, dim=32, depth=2, heads=4, kv_heads=2, hidden=48, **options).double().eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (1, n), generator=generator) for n in (20, 31, 9)]


@pytest.mark.parametrize("p", [0.25, 0.5, 0.99, 1.0])
def test_a_quantile_is_an_entry_that_so_many_do_not_exceed(p):
    x = torch.randn(7, 9)
    found = quantile(x, p)
    assert (x <= found).sum() == int(63 * p) and (x == found).any()


def test_kernels_equal_dense_products():
    for n, c, density in ((300, 40, 0.5), (5, 3, 1.0), (64, 8, 0.0)):
        weights, rows, x = torch.randn(n).double(), torch.randn(n, c).double(), torch.randn(c).double()
        weights *= torch.rand(n) < density
        at = weights.nonzero().view(-1)
        torch.testing.assert_close(weighted_rows(weights[at], rows, at), weights @ rows)
        torch.testing.assert_close(chosen_rows(x, rows, at), rows[at] @ x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_token_by_the_kernels_is_what_it_is_among_others(dtype):
    dense = SwiGLU(16, 40).to(dtype)
    for threshold in (torch.tensor(0.05), torch.rand(40) / 5, torch.tensor(100.0), torch.tensor(0.0)):
        sparse, x = SparseSwiGLU(dense, threshold), torch.randn(2, 3, 16, dtype=dtype)
        together = sparse(x)
        with torch.no_grad():
            alone = torch.stack(
                [torch.cat([sparse(x[b : b + 1, i : i + 1]) for i in range(3)], 1)[0] for b in range(2)]
            )
        torch.testing.assert_close(alone, together)


def test_sparse_layers_equal_the_equations_written_out():
    dense, x, threshold = SwiGLU(16, 40).double(), torch.randn(6, 16).double(), torch.rand(40).double() / 5
    wanted = []
    for token in x:
        y = torch.zeros(16, dtype=torch.float64)
        for i in range(40):
            a = silu(dense.w1.weight[i] @ token)
            if not a.abs() < threshold[i]:
                y = y + a * (dense.w3.weight[i] @ token) * dense.w2.weight[:, i]
        wanted.append(y)
    torch.testing.assert_close(SparseSwiGLU(dense, threshold)(x), torch.stack(wanted))


def test_only_queries_see_the_sparse_input():
    dense, x = nn.Linear(8, 12).double(), torch.randn(2, 5, 8).double()
    sparse, kept = SparseLinear(dense, torch.tensor(0.5), rows=4), torch.where(x.abs() < 0.5, 0.0, x)
    torch.testing.assert_close(sparse(x)[..., :4], dense(kept)[..., :4])
    torch.testing.assert_close(sparse(x)[..., 4:], dense(x)[..., 4:])
    with torch.no_grad():
        torch.testing.assert_close(sparse(x[:1, :1]), sparse(x)[:1, :1])
    torch.testing.assert_close(linear(x, sparse.weight, sparse.bias), dense(x))


def test_calibration_is_the_mean_of_each_texts_own_numbers():
    net = model()
    found, seen = calibrate(net, texts(), sparsity=0.5), []
    hook = net.blocks[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for text in texts():
        net(text)
    hook.remove()
    mlp = net.blocks[1].mlp
    a, u = ([(silu(mlp.w1(x)) if w == 1 else mlp.w3(x)).abs()[0] for x in seen] for w in (1, 3))
    up = sum(x.mean(0) for x in u) / 3
    here = found["blocks.1.mlp"]
    torch.testing.assert_close(here.up_abs_mean, up)
    torch.testing.assert_close(here.cats, sum(quantile(x, 0.5) for x in a) / 3)
    torch.testing.assert_close(here.importance, sum(quantile(x * up, 0.5) for x in a) / 3)
    torch.testing.assert_close(here.chess * up, here.importance.expand(48))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_as_many_channels_are_skipped_as_was_asked(sparsity):
    net = model()
    found = calibrate(net, texts(), sparsity=sparsity)
    sparse, shares = sparsify(net, found, method="cats"), []
    mlp, threshold = net.blocks[0].mlp, found["blocks.0.mlp"].chess
    hook = sparse.blocks[0].mlp.register_forward_pre_hook(
        lambda module, args: shares.append((silu(mlp.w1(args[0])).abs() < threshold).double().mean())
    )
    for text in texts():
        sparse(text)
    hook.remove()
    assert float(sum(shares) / 3) == pytest.approx(sparsity, abs=0.03)


@pytest.mark.parametrize("method", ["cats", "chess", "chess+"])
def test_nothing_skipped_is_the_dense_model(method):
    net = model()
    sparse = sparsify(net, calibrate(net, texts(), sparsity=0.0), method=method)
    torch.testing.assert_close(sparse(texts()[0]), net(texts()[0]))


@pytest.mark.parametrize("method", ["cats", "chess", "chess+"])
def test_sparse_models_decode_as_they_read(method):
    net = model()
    sparse, text = sparsify(net, calibrate(net, texts()), method=method), texts()[0]
    full, state, pieces = sparse(text), sparse.initial_state(1, dtype=torch.float64), []
    assert not torch.allclose(full, net(text))
    with torch.no_grad():
        for token in text.split(1, 1):
            y, state = sparse(token, state=state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), full)


def test_chess_drops_the_least_importance_of_all_masks_of_its_size():
    a, up = torch.randn(200).double().abs(), torch.rand(200).double() + 0.1
    keep = a >= quantile(a * up, 0.5) / up
    dropped = (a * up)[~keep].sum()
    for seed in range(50):
        other = torch.randperm(200, generator=torch.Generator().manual_seed(seed)) < keep.sum()
        assert dropped <= (a * up)[~other].sum()
    by_cats = a.argsort(descending=True).argsort() < keep.sum()
    assert dropped < (a * up)[~by_cats].sum()


def test_where_all_channels_weigh_the_same_it_is_cats():
    a = torch.rand(300)
    found = Thresholds(torch.full((300,), 0.7), quantile(a, 0.5), quantile(a * 0.7, 0.5))
    torch.testing.assert_close(found.chess, found.cats.expand(300))


class Digits(nn.Module):
    """A gated feed-forward between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp, self.last = nn.Linear(64, 48), SwiGLU(48, 128), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + self.mlp(x))


def test_on_digits_it_errs_less_than_cats_at_equal_sparsity():
    digits = load_digits()
    x, y = torch.tensor(digits.images).float().flatten(1) / 8 - 1, torch.tensor(digits.target)
    torch.manual_seed(0)
    net = Digits()
    with torch.no_grad():
        # Channels of unlike scale, as trained language models have them.
        net.mlp.w3.weight.mul_(torch.exp(torch.randn(128, 1)))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(150):
        part = slice(step % 5 * 256, step % 5 * 256 + 256)
        optimizer.zero_grad()
        cross_entropy(net(x[part]), y[part]).backward()
        optimizer.step()
    test = x[1280:]
    assert (net(test).argmax(1) == y[1280:]).float().mean() > 0.85
    for sparsity in (0.5, 0.6, 0.7):
        found = calibrate(net, [x[:600].unsqueeze(0), x[600:1280].unsqueeze(0)], sparsity=sparsity)
        errors = {
            m: (sparsify(net, found, method=m).mlp(net.first(test)) - net.mlp(net.first(test))).norm().item()
            for m in ("chess", "cats")
        }
        assert errors["chess"] < 0.9 * errors["cats"]


def test_bad_input_is_named():
    net = model()
    found = calibrate(net, texts())
    with pytest.raises(ValueError, match="p must be"):
        quantile(torch.ones(3), 1.5)
    with pytest.raises(ValueError, match="at least 10"):
        quantile(torch.ones(3), 0.1)
    with pytest.raises(ValueError, match="method must be one of"):
        sparsify(net, found, method="dense")
    with pytest.raises(ValueError, match="another model"):
        sparsify(build("llama", vocabulary=50, dim=32, depth=1, heads=4, hidden=48), found)
    with pytest.raises(ValueError, match="no SwiGLU"):
        calibrate(nn.Linear(2, 2), texts())
    with pytest.raises(ValueError, match="texts"):
        calibrate(net, [])
    with pytest.raises(ValueError, match="threshold"):
        SparseSwiGLU(SwiGLU(4, 6), torch.ones(5))
    with pytest.raises(ValueError, match="threshold one number"):
        SparseLinear(nn.Linear(4, 6), torch.ones(5))
