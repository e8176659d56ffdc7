"""FlexAttention as a backend: what it refuses before it compiles, the blocks that it is given, and the result."""

import dataclasses

import pytest
import torch

from attnlab import attend, compiling
from attnlab.attend import pose
from attnlab.backends import flex
from attnlab.patterns import Causal, Documents, Explicit, Neighborhood, Sinks, Window
from attnlab.problem import Lookup

Q = torch.zeros(1, 2, 256, 32)


def reason(q=Q, **keywords):
    with compiling():
        return flex.Flex().unsupported(pose(q, q, q, **keywords))


def test_what_it_cannot_do_is_known_before_it_compiles():
    assert reason(pattern=Window(4)) == ""
    assert "no gradient on the CPU" in reason(Q.clone().requires_grad_())
    assert "no lse on the CPU" in reason(return_lse=True)
    assert "float64" in reason(Q.double())
    assert "dropout" in reason(dropout=0.1)
    assert "only softmax" in reason(weighting="sigmoid")
    assert "Documents" in reason(pattern=Documents((100, 156)) & Causal())
    assert "Documents" in reason(pattern=~Documents((100, 156)).starting_at(0))
    assert "opt in" in flex.Flex().unsupported(pose(Q, Q, Q))


def test_inside_torch_compile_it_is_for_problems_that_are_large_enough():
    small = dataclasses.replace(pose(Q, Q, Q), traced=True, may_compile=True)
    large = dataclasses.replace(small, nq=4096, nk=4096)
    assert "not worth it" in flex.Flex().unsupported(small) and flex.Flex().unsupported(large) == ""


@pytest.mark.parametrize(
    ("pattern", "nq", "nk"),
    [
        (Window(200), 700, 700),
        ((Window(100) | Sinks(4)) & Causal(), 650, 650),
        (Causal(), 300, 513),
        (Neighborhood((20, 25), 7, 2), 500, 500),
        (Causal().starting_at(300), 200, 500),
    ],
    ids=str,
)
def test_its_blocks_are_those_of_torchs_own_constructor(pattern, nq, nk):
    def blocks(mask):
        full, some = (torch.zeros(-(-nq // 128), -(-nk // 128), dtype=torch.bool) for _ in range(2))
        counts = (mask.full_kv_num_blocks, mask.full_kv_indices), (mask.kv_num_blocks, mask.kv_indices)
        for found, (number, index) in zip((full, some), counts, strict=True):
            for row in range(len(found)):
                found[row, index[0, 0, row, : int(number[0, 0, row])].long()] = True
        return full, some

    ours = flex._block_mask(pattern, 1, 1, nq, nk, torch.device("cpu"))
    torchs = flex.create_block_mask(flex._mask_mod(pattern), None, None, nq, nk, device="cpu")
    (full, some), (wanted_full, wanted_some) = blocks(ours), blocks(torchs)
    assert torch.equal(full | some, wanted_full | wanted_some)
    # Where the queries end inside a block, ours takes it in full, which saves a mask.
    assert bool((full >= wanted_full).all()) and torch.equal(full[: nq // 128], wanted_full[: nq // 128])
    assert ours.seq_lengths == (nq, nk)


def test_a_pattern_for_each_head_has_blocks_for_each_head():
    seen = torch.zeros(1, 2, 256, 256, dtype=torch.bool)
    seen[0, 1, :128, 128:] = True
    mask = flex._block_mask(Explicit(seen), 1, 2, 256, 256, torch.device("cpu"))
    assert mask.full_kv_num_blocks.tolist() == [[[0, 0], [1, 0]]] and int(mask.full_kv_indices[0, 1, 0, 0]) == 1


def test_a_bias_is_read_where_it_is_broadcast():
    q = torch.zeros(2, 3, 4, 8)
    index = [torch.tensor(i) for i in (1, 2, 3, 0)]
    for shape in ((4, 4), (3, 1, 4), (2, 3, 4, 4), (2, 1, 1, 4), (4,)):
        bias = torch.randn(shape)
        score = flex._score_mod(pose(q, q, q, bias=bias))
        assert score(torch.zeros(()), *index) == bias.expand(2, 3, 4, 4)[1, 2, 3, 0]
    by_index = flex._score_mod(pose(q, q, q, bias=lambda b, h, i, j: (b * 1000 + h * 100 + i * 10 + j) * 1.0))
    assert by_index(torch.zeros(()), *index) == 1230
    assert flex._score_mod(pose(q, q, q)) is None


def test_a_compiler_that_fails_is_reported_and_remembered(monkeypatch):
    def broken(*args, **keywords):
        raise NotImplementedError("this shape\nand more")

    backend = flex.Flex()
    monkeypatch.setattr(flex, "_compiled", lambda: broken)
    with compiling():
        problem = pose(Q, Q, Q, pattern=Window(4))
        with pytest.raises(flex.FlexFailed, match="failed to compile: NotImplementedError: this shape"):
            backend.run(problem, Q, Q, Q)
        assert "this shape" in backend.unsupported(problem)
        assert backend.unsupported(pose(Q, Q, Q, pattern=Window(5))) == ""


def test_the_ninth_problem_is_compiled_too(monkeypatch):
    from torch._dynamo import config

    limits = []

    def compiled(q, k, v, **keywords):
        limits.append((config.recompile_limit, config.accumulated_recompile_limit, config.fail_on_recompile_limit_hit))
        return v

    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    before = config.recompile_limit
    flex.Flex().run(pose(Q, Q, Q, pattern=Window(4)), Q, Q, Q)
    assert limits == [(1024, 4096, True)] and config.recompile_limit == before


def test_visiting_fewer_blocks_is_predicted_to_be_cheaper():
    with compiling():
        q = torch.zeros(1, 2, 4096, 32)
        full, window = (flex.Flex().cost(pose(q, q, q, pattern=p)) for p in (None, Window(128)))
    # Two blocks of 128 for each of the 32 block rows but the first.
    assert window.flops == pytest.approx(full.flops * 63 / 1024, rel=0.05)


CASES = {
    "window": (Window(64), {}),
    "sinks": ((Window(30) | Sinks(4)) & Causal(), {}),
    "neighborhood": (Neighborhood((15, 20), 5, 2), {}),
    "rows without keys": (Window(20) & ~Window(9), {}),
    "bias": (Causal(), {"bias": torch.randn(2, 300, 300)}),
    "function": (None, {"bias": lambda b, h, q, k: (q - k).abs() * -0.1}),
    "lookup": (Causal(), {"bias": Lookup(torch.randn(599, 2), lambda q, k: q - k + 299)}),
}


def check(pattern, keywords, tokens=300):
    q, k, v = torch.randn(1, 4 if not keywords else 2, tokens, 32), *torch.randn(2, 1, 2, tokens, 32)
    with torch.no_grad(), compiling():
        out = attend(q, k, v, pattern=pattern, backend="flex", **keywords)
    torch.testing.assert_close(
        out, attend(q, k, v, pattern=pattern, backend="reference", **keywords), rtol=0, atol=3e-6
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_what_is_handed_to_torch_means_the_same_even_uncompiled(name, monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    check(*CASES[name])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_where_it_gives_an_lse_that_is_the_oracles(monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    q, k, v = (torch.randn(1, 2, 150, 16) for _ in range(3))
    found = flex.Flex().run(pose(q, k, v, pattern=Window(9), return_lse=True), q, k, v)
    wanted = attend(q, k, v, pattern=Window(9), return_lse=True, backend="reference")
    for ours, oracle in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=3e-6)


@pytest.mark.skipif(flex._no_compiler("cpu") != "", reason="needs a C++ compiler")
def test_compiled_it_equals_the_oracle():
    check(*CASES["window"])


@pytest.mark.slow
@pytest.mark.skipif(flex._no_compiler("cpu") != "", reason="needs a C++ compiler")
@pytest.mark.parametrize("name", [n for n in CASES if n != "window"])
def test_compiled_it_equals_the_oracle_for_every_kind_of_pattern_and_bias(name):
    check(*CASES[name])


@pytest.mark.slow
@pytest.mark.skipif(flex._no_compiler("cpu") != "", reason="needs a C++ compiler")
def test_inside_torch_compile_it_is_part_of_the_graph():
    q, k, v = (torch.randn(1, 1, 2100, 16) for _ in range(3))
    with torch.no_grad():
        compiled = torch.compile(lambda q, k, v: attend(q, k, v, pattern=Window(64)), fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v, pattern=Window(64)), rtol=0, atol=3e-6)
