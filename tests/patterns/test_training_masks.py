"""The masks of training on long contexts: equal to their definitions, on every backend, at the right cost."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from attnlab import attend, explain
from attnlab.patterns import BlockCausal, Causal, From, Rectangle, Rectangles, Starts
from attnlab.patterns.training import STATIC, Setting, area, document_lengths, flops, mask, rectangle
from attnlab.routing.random_blocks import block_sparse

LENGTHS = (11, 30, 23)
SETTING = Setting(LENGTHS, window=6, block=8, prefix=3)
DOC = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
START = torch.tensor([0, 11, 41])
W, B, P = 6, 8, 3
# The equations, one pair at a time, as a second and obvious transcription.
SEES = {
    "full": lambda q, k: True,
    "causal": lambda q, k: q >= k,
    "sliding_window": lambda q, k: abs(q - k) <= W,
    "sliding_window_causal": lambda q, k: 0 <= q - k <= W,
    "full_document": lambda q, k: DOC[q] == DOC[k],
    "causal_document": lambda q, k: DOC[q] == DOC[k] and q >= k,
    "block_causal": lambda q, k: k <= (q // B + 1) * B,
    "varlen_block_causal": lambda q, k: DOC[q] == DOC[k] and k <= (q // B + 1) * B,
    "block_causal_document": lambda q, k: DOC[q] == DOC[k] and k < (q // B + 1) * B,
    "prefix_lm_causal": lambda q, k: q >= k or k <= P,
    "prefix_lm_document": lambda q, k: DOC[q] == DOC[k] and (q >= k or k - START[DOC[k]] <= P),
    "share_question": lambda q, k: (DOC[q] == DOC[k] and q >= k) or (DOC[k] == 0 and DOC[q] != 0),
    "causal_blockwise": lambda q, k: (DOC[q] == DOC[k] and q >= k) or (DOC[q] == 2 and DOC[k] != 2),
    "global_sliding_window": lambda q, k: abs(q - k) <= W or q < 2 * W or k < 2 * W,
}


@pytest.mark.parametrize("kind", STATIC)
def test_a_mask_is_its_definition_and_flexattentions(kind):
    n = SETTING.tokens
    pattern = mask(kind, SETTING)
    wanted = torch.tensor([[bool(SEES[kind](q, k)) for k in range(n)] for q in range(n)])
    assert torch.equal(pattern.matrix(n), wanted)
    theirs = create_mask(lambda b, h, q, k: pattern.allows(b, h, q, k), 1, 1, n, n, device="cpu")
    assert torch.equal(theirs[0, 0], wanted)
    assert area(pattern, n) == int(wanted.sum())
    assert mask(kind, SETTING) == pattern  # so that a plan is made once


@pytest.mark.parametrize("kind", STATIC)
def test_every_backend_gives_the_same_under_every_mask(kind):
    n, pattern = SETTING.tokens, mask(kind, SETTING)
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for _ in range(3))
    wanted = attend(q, k, v, pattern=pattern, backend="reference")
    able = [row.name for row in explain(q, k, v, pattern=pattern).rows if not row.reason and row.name != "natten"]
    assert {"tiles", "dense"} <= set(able)
    for backend in able:
        torch.testing.assert_close(attend(q, k, v, pattern=pattern, backend=backend), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["full", "causal", "invcausal", "bicausal"])
def test_a_range_lies_where_its_diagonal_does(kind):
    for nq, nk in ((4, 6), (6, 4)):
        seen = rectangle(kind, nq, nk).matrix(nq, nk)
        low, high = (
            (0 if kind in ("invcausal", "bicausal") else -nq),
            (nk - nq if kind in ("causal", "bicausal") else nk),
        )
        wanted = torch.ones(nq, nk, dtype=torch.bool).triu(low) & torch.ones(nq, nk, dtype=torch.bool).tril(high)
        assert torch.equal(seen, wanted)


def test_rectangles_together_are_documents():
    parts = (
        Rectangle(0, 11, 0, 11, "causal"),
        Rectangle(11, 41, 11, 41, "causal"),
        Rectangle(41, 64, 41, 64, "causal"),
    )
    assert torch.equal(Rectangles(parts).matrix(64), mask("causal_document", SETTING).matrix(64))


def test_the_count_of_work_is_the_benchmarks():
    assert area(Causal(), 100) == 100 * 101 // 2
    assert flops(5050, 8, 64) == 4 * 5050 * 8 * 64
    assert flops(5050, 8, 64, backward=True) == 3.5 * flops(5050, 8, 64)


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_random_blocks_have_the_sparsity_that_was_asked_for(shared, variable):
    route = block_sparse(1024, heads=4, block=32, sparsity=0.75, shared=shared, variable=variable)
    assert route.table.shape[1] == (1 if shared else 4)
    kept = route.table.sum(-1)
    assert (kept == max(1, round(route.keys.count * 0.25))).all()
    assert route.queries.length == 1024
    if not variable:
        assert route.density() == pytest.approx(0.25)
    q, k, v = (torch.randn(1, 4, 1024, 8) for _ in range(3))
    wanted = attend(q, k, v, pattern=route, backend="reference")
    torch.testing.assert_close(attend(q, k, v, route=route), wanted, rtol=1e-4, atol=1e-5)
    again = block_sparse(1024, heads=4, block=32, sparsity=0.75, shared=shared, variable=variable)
    assert torch.equal(again.table, route.table)


def test_documents_are_drawn_until_the_tokens_are_spent():
    lengths = document_lengths(50_000, seed=3)
    assert sum(lengths) == 50_000
    assert all(256 <= n <= 16_384 for n in lengths[:-1])
    assert document_lengths(50_000, seed=3) == lengths != document_lengths(50_000, seed=4)


def test_what_makes_no_mask_is_refused():
    for wrong, said in (
        (lambda: mask("diagonal", SETTING), "mask must be one of full, causal"),
        (lambda: rectangle("round", 3, 3), "kind must be one of full"),
        (lambda: Setting((3, 0)), "lengths"),
        (lambda: Setting((3,), window=0), "window must be at least 1"),
        (lambda: BlockCausal(0), "size"),
        (lambda: BlockCausal(3, extra=-1), "extra"),
        (lambda: Starts((3, 4), 0), "count"),
        (lambda: Starts((3, 4), 1).matrix(5), "sum to 7"),
        (lambda: Rectangle(3, 3, 0, 1), "must not be empty"),
        (lambda: Rectangle(0, 3, 0, 1, "round"), "shape must be one of"),
        (lambda: block_sparse(64, heads=1, sparsity=1.0), "sparsity must be in"),
        (lambda: document_lengths(0), "tokens ≥ 1"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
    with pytest.raises(TypeError, match="Rectangles"):
        Rectangles((3,))
    assert not From(3).matrix(4)[:3].any()
