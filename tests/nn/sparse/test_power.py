"""PowerAttention: its mask by hand, how far it reaches and how little it reads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnlab.cost import count_flops
from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.power import PowerAttention
from attnlab.patterns import Dilated, Explicit, Pattern, PowersOfTwo, Window
from attnlab.positions import ALiBi, BucketBias, Rotary

DIM = 24


def make(**keywords) -> PowerAttention:
    torch.manual_seed(0)
    m = PowerAttention(DIM, **{"heads": 4, "kv_heads": 2, "block": 3, "window": 2, "sinks": 1, **keywords})
    return m.double().eval()


def tokens(n: int = 50) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def visible(i: int, j: int, block: int, window: int, sinks: int) -> bool:
    delta = i // block - j // block
    power = delta in (0, *(2**p for p in range(20)))
    return j <= i and (power or delta < window or j // block < sinks)


@pytest.mark.parametrize(("block", "window", "sinks"), [(1, 1, 0), (3, 2, 1), (4, 3, 0), (7, 1, 2)])
def test_equals_full_attention_under_its_mask(block: int, window: int, sinks: int) -> None:
    m, x = make(block=block, window=window, sinks=sinks), tokens()
    seen = torch.tensor([[visible(i, j, block, window, sinks) for j in range(50)] for i in range(50)])
    plain = MultiHead(DIM, heads=4, kv_heads=2).double().eval()
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x), plain(x, pattern=Explicit(seen)))
    for i in range(50):
        spans = [j for a, b in m.spans(i) for j in range(a, b)]
        assert spans == seen[i].nonzero().flatten().tolist()


def smallest_depth(pattern: Pattern, distance: int, n: int) -> float:
    for depth in range(1, n):
        if pattern.reach(depth, n)[distance, 0]:
            return depth
    return math.inf


def test_a_distance_is_reached_in_as_many_layers_as_it_has_ones_in_binary() -> None:
    pattern, n = PowersOfTwo(block=1, window=1, sinks=0), 65
    reached = torch.stack([pattern.reach(depth, n)[:, 0] for depth in range(1, 8)])
    for distance in range(1, n):
        assert int(reached[:, distance].int().argmax()) + 1 == bin(distance).count("1")


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_every_distance_below_two_to_the_depth_is_reached(depth: int) -> None:
    reach = PowersOfTwo(block=1, window=1, sinks=0).reach(depth, 2**depth)
    assert reach.tril().equal(torch.ones(2**depth, 2**depth).bool().tril())


@pytest.mark.parametrize("n", [2, 3, 8, 100, 257])
def test_a_query_sees_no_more_than_log_n_blocks(n: int) -> None:
    degree = PowersOfTwo(block=1, window=1, sinks=0).matrix(n).sum(-1).max()
    assert degree <= math.floor(math.log2(n)) + 2


def test_other_patterns_of_the_same_price_reach_less() -> None:
    n, depth = 129, 7
    power = PowersOfTwo(block=1, window=1, sinks=0)
    price = int(power.matrix(n).sum(-1).max())
    assert power.reach(depth, n)[n - 1].all()
    window, dilated = Window(price), Dilated(2, price)
    assert int(window.reach(depth, n)[n - 1].sum()) == depth * (price - 1) + 1
    odd = torch.arange(n - 2, -1, -2)
    assert not dilated.reach(n, n)[n - 1, odd].any()


def test_strides_need_a_root_of_n_keys_where_powers_need_a_logarithm() -> None:
    n, root = 256, 16
    strided, power = Window(root) | Dilated(root), PowersOfTwo(block=1, window=1, sinks=0)
    assert strided.reach(2, n)[n - 1].all()
    assert int(strided.matrix(n).sum(-1).max()) == 2 * root - 1
    assert int(power.matrix(n).sum(-1).max()) == 9
    assert power.reach(8, n)[n - 1].all()


def test_three_tokens_see_each_other_all() -> None:
    assert PowersOfTwo(block=1, window=1, sinks=0).matrix(3).equal(torch.ones(3, 3).bool().tril())


def test_the_papers_defaults_see_six_percent_at_32k() -> None:
    """About ten blocks of 256 a query at 32k, a sparsity of 94 % (arXiv 2503.03588)."""
    spans = [PowerAttention(DIM, heads=4).spans(i) for i in range(255, 32768, 256)]
    blocks = [sum(b - a for a, b in s) / 256 for s in spans]
    assert max(blocks) <= 11
    assert 1 - sum(blocks) / sum(range(1, 129)) == pytest.approx(0.86, abs=0.02)
    assert 1 - sum(blocks) / 128**2 == pytest.approx(0.93, abs=0.01)


@pytest.mark.parametrize("pieces", [[1] * 50, [20, 1, 1, 28]], ids=str)
@pytest.mark.parametrize(
    "position", [None, Rotary(6), ALiBi(4), BucketBias(4, count=8)], ids=["none", "rotary", "alibi", "buckets"]
)
def test_pieces_give_what_the_whole_gives(position, pieces: list[int]) -> None:
    m, x = make(position=position), tokens()
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x), rtol=1e-9, atol=1e-9)


def test_a_decoding_step_reads_only_the_blocks_it_sees() -> None:
    m = make(block=4)
    projections = 2 * 2 * DIM * (m.wqkv.out_features + DIM)
    with torch.no_grad():
        _, state = m(tokens(1000), state=m.initial_state(2))
        work = count_flops(lambda: m(tokens(1), state=state)) - projections
    seen = sum(b - a for a, b in m.spans(1000))
    assert work == 2 * 2 * 4 * seen * (6 + 6)
    assert seen < 1000 / 20


def test_a_pattern_given_with_the_call_narrows_it_in_pieces_too() -> None:
    m, x = make(), tokens(20)
    with torch.no_grad():
        _, state = m(x[:, :19], state=m.initial_state(2), pattern=Window(5))
        y, _ = m(x[:, 19:], state=state, pattern=Window(5))
        torch.testing.assert_close(y, m(x, pattern=Window(5))[:, 19:])


def test_it_only_looks_back() -> None:
    with pytest.raises(ValueError, match="causal must be True"):
        make(causal=False)
    with pytest.raises(ValueError, match="block must be"):
        make(block=0)


def accuracy(mixer: str, options: dict, *, depth: int = 3, length: int = 40, steps: int = 500) -> dict[int, float]:
    """How often a small decoder names a key that it read some tokens ago, by that distance."""
    keys, mark, ask, fill = 8, 8, 9, 10
    torch.manual_seed(0)
    model = Decoder(vocabulary=13, dim=32, depth=depth, heads=2, mixer=mixer, mixer_options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def texts(count: int, distance: Tensor) -> tuple[Tensor, Tensor]:
        ids, key, row = torch.randint(fill, 13, (count, length)), torch.randint(keys, (count,)), torch.arange(count)
        ids[row, length - 1 - distance] = key
        ids[row, length - 2 - distance] = mark
        ids[:, -1] = ask
        return ids, key

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 30, 4 * (1 - step / steps))
        reach = max(4, int((length - 2) * min(1.0, 2 * step / steps)))
        ids, key = texts(32, torch.randint(1, reach, (32,)))
        loss = nn.functional.cross_entropy(model(ids, last=True)[:, 0], key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = {}
    with torch.no_grad():
        for distance in (2, 36):
            ids, key = texts(256, torch.full((256,), distance))
            found[distance] = (model(ids, last=True)[:, 0].argmax(-1) == key).float().mean().item()
    return found


@pytest.mark.slow
def test_a_passkey_travels_where_a_window_of_the_same_price_cannot_bring_it() -> None:
    """The paper's claim: beyond depth · (window − 1) a window guesses, one of eight; powers of two find the key."""
    power = accuracy("power", dict(block=1, window=1, sinks=0))
    window = accuracy("sliding_window", dict(window=7, sinks=0))
    assert power[2] > 0.9 and window[2] > 0.9
    assert power[36] > 0.5
    assert window[36] < 0.3  # 3 layers of 6 tokens end at 18; chance is 0.125
