"""Core-context attention: the equations query by query, what is seen once and only once, and what a window loses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cost import count_flops
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.core_context import CoreContext
from attnlab.nn.sparse.streaming_llm import SlidingWindow
from attnlab.patterns import Causal
from attnlab.positions import ALiBi, Rotary

DIM = 16


def make(**keywords) -> CoreContext:
    torch.manual_seed(0)
    options = {"heads": 4, "kv_heads": 2, "group": 4, "window": 6, "position": Rotary(4), "bias": True, **keywords}
    return CoreContext(DIM, **options).double().eval()


def plain(m: CoreContext) -> MultiHead:
    other = MultiHead(DIM, heads=4, kv_heads=m.kv_heads, causal=True, position=m.position, bias=True).double().eval()
    other.load_state_dict(m.state_dict())
    return other


def tokens(n: int = 30) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def query_by_query(m: CoreContext, text: Tensor) -> Tensor:
    """The equations of the paper with 1-based i, for one text; cores are pooled inputs, which are then projected."""
    wq, wk, wv = m.wqkv.weight.split([16, 4 * m.kv_heads, 4 * m.kv_heads])
    bq, bk, bv = m.wqkv.bias.split([16, 4 * m.kv_heads, 4 * m.kv_heads])
    n, g, s, shared = len(text), m.group, m.window, m.heads // m.kv_heads

    def turned(x: Tensor, at: int) -> Tensor:
        return x if m.position is None else m.position.turn_to(x[None], torch.tensor([at]))[0]

    def query(i: int, h: int) -> Tensor:
        return turned(m.q_norm((wq @ text[i] + bq)[4 * h : 4 * h + 4]), i)

    def key(t: Tensor, at: int, u: int) -> Tensor:
        return turned(m.k_norm((wk @ t + bk)[4 * u : 4 * u + 4]), at)

    def value(t: Tensor, u: int) -> Tensor:
        return (wv @ t + bv)[4 * u : 4 * u + 4]

    def logits(c: int, u: int) -> Tensor:
        queries = [query(c * g + g - 1, h) for h in range(u * shared, u * shared + shared)]
        asks = sum(queries) / shared if m.gqa_query == "mean" else queries[0]
        return torch.stack([asks @ key(text[j], j, u) for j in range(c * g, c * g + g)])

    def core(c: int, u: int) -> tuple[Tensor, Tensor]:
        if m.pool_scope == "head":
            w = (logits(c, u) / 4**0.5).softmax(0)
        else:
            w = (sum(logits(c, other) for other in range(m.kv_heads)) / (4 * m.kv_heads) ** 0.5).softmax(0)
        pooled = w @ text[c * g : c * g + g]  # the input, before any projection
        if m.core_pos == "pooled":
            return sum(w[j] * key(text[c * g + j], c * g + j, u) for j in range(g)), value(pooled, u)
        return key(pooled, c * g + {"first": 0, "middle": g // 2, "last": g - 1}[m.core_pos], u), value(pooled, u)

    out = torch.zeros_like(text)
    for u in range(m.kv_heads):
        cores = [core(c, u) for c in range(n // g)]
        tokens = [(key(t, at, u), value(t, u)) for at, t in enumerate(text)]
        for i in range(1, n + 1):
            j = max(0, (i - s) // g)
            keys, values = (torch.stack(part) for part in zip(*cores[:j], *tokens[j * g : i], strict=True))
            for h in range(u * shared, u * shared + shared):
                weights = (keys @ query(i - 1, h) / 4**0.5).softmax(0)
                out[i - 1, 4 * h : 4 * h + 4] = weights @ values
    return m.wo(out)


@pytest.mark.parametrize("options", [
    {},
    {"pool_scope": "shared", "gqa_query": "first"},
    {"core_pos": "first", "gqa_query": "first"},
    {"core_pos": "middle", "kv_heads": 4, "pool_scope": "shared"},
    {"core_pos": "pooled", "kv_heads": 1},
    {"position": None, "qk_norm": nn.RMSNorm, "group": 3, "window": 1},
    {"qk_norm": nn.RMSNorm},
])  # fmt: skip
def test_it_is_the_equations_query_by_query(options) -> None:
    m, x = make(**options), tokens(19)
    with torch.no_grad():
        torch.testing.assert_close(m(x), torch.stack([query_by_query(m, text) for text in x]))


def test_a_window_over_everything_is_causal_attention() -> None:
    m, x = make(window=30), tokens()
    torch.testing.assert_close(m(x), plain(m)(x))


@pytest.mark.parametrize("window", [1, 3, 30])
def test_groups_of_one_token_are_causal_attention_for_every_window(window: int) -> None:
    m, x = make(group=1, window=window), tokens()
    torch.testing.assert_close(m(x), plain(m)(x))


def test_every_token_so_far_is_seen_once_and_no_other() -> None:
    for group, window in ((4, 6), (3, 1), (5, 5), (16, 2)):
        m = make(group=group, window=window)
        with torch.no_grad():
            m.wqkv.weight[:16].zero_(), m.wqkv.bias[:16].zero_()  # without a preference, a core shares out its weight
        weights = m.weights(tokens(40))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert torch.equal(weights > 0, torch.ones(40, 40).tril().bool().expand_as(weights))
        for i in range(40):
            j = max(0, (i + 1 - window) // group)
            alone = 1 / (j + i + 1 - j * group)
            wanted = torch.tensor([alone / group] * (j * group) + [alone] * (i + 1 - j * group), dtype=torch.float64)
            torch.testing.assert_close(weights[0, 0, i, : i + 1], wanted)


def test_no_output_depends_on_later_tokens() -> None:
    m, x = make(), tokens()
    for t in (3, 4, 17, 29):
        other = x.clone()
        other[:, t] += 1.0
        same = (m(other) == m(x)).all(-1)[0]
        assert bool(same[:t].all()) and not bool(same[t])


@pytest.mark.parametrize("pieces", [[1] * 150, [3, 1, 90, 1, 55], [150]], ids=["single", "mixed", "whole"])
@pytest.mark.parametrize("options", [{}, {"group": 1, "window": 1}, {"core_pos": "pooled", "group": 7, "window": 3}])
def test_pieces_give_what_the_whole_gives(options, pieces: list[int]) -> None:
    m, x = make(**options), tokens(150)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for i, piece in enumerate(x.split(pieces, 1)):
            y, state = m(piece, state=state.clone() if i % 5 == 0 else state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x), rtol=1e-9, atol=1e-9)


def test_decoding_keeps_a_core_per_group_and_the_tokens_near() -> None:
    m = make(group=16, window=32)
    state = m.initial_state(1)
    with torch.no_grad():
        for n in (1, 40, 500, 1, 1000, 58):
            _, state = m(tokens(n)[:1], state=state)
            assert 32 - 1 <= state.near.length - state.gone <= 32 + 16 - 1 or state.length < 47
            assert state.cores.length == state.length // 16
        assert state.bytes() < 0.25 * plain_bytes(state.length)
        # One more token is read against N/g cores and at most s + g tokens.
        keys = (count_flops(m, tokens(1)[:1], state=state) - 2 * 16 * (32 + 16)) / (4 * 16)
    assert keys <= 1600 / 16 + 48 + 16 / 4


def plain_bytes(n: int) -> int:
    return 2 * 2 * 4 * 8 * n  # k and v, key heads, channels, float64


def test_time_grows_with_cores_and_window_not_with_all_pairs() -> None:
    m, full = make(group=16, window=64).float(), make(window=4096).float()
    x = tokens(2048)[:1].float()
    with torch.no_grad():
        assert count_flops(m, x) < 0.2 * count_flops(full, x)


def test_group_and_window_may_be_set_anew() -> None:
    m, x = make(), tokens()
    other = make(group=2, window=9)
    m.group, m.window = 2, 9
    torch.testing.assert_close(m(x), other(x))


def test_it_learns_to_find_what_a_window_of_as_many_keys_has_lost() -> None:
    # One marked token holds one of four values; the last token asks for it. It sees 11 cores and 4 to 7 tokens.
    def texts(count: int) -> tuple[Tensor, Tensor]:
        x, answer = 0.3 * torch.randn(count, 48, 16), torch.randint(0, 4, (count,))
        sample, place = torch.arange(count), torch.randint(0, 28, (count,))
        x[sample, place, 8] = 2.0
        x[sample, place, answer] = 2.0
        x[:, -1, 9] = 2.0
        return x, answer

    def accuracy(mixer: nn.Module) -> float:
        head = nn.Linear(16, 4)
        optimizer = torch.optim.Adam([*mixer.parameters(), *head.parameters()], 2e-2)
        for _ in range(200):
            x, answer = texts(32)
            loss = F.cross_entropy(head(mixer(x)[:, -1]), answer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, answer = texts(400)
        with torch.no_grad():
            return (head(mixer(x)[:, -1]).argmax(-1) == answer).float().mean().item()

    torch.manual_seed(0)
    assert accuracy(CoreContext(16, heads=2, group=4, window=4, bias=True)) > 0.9
    assert accuracy(SlidingWindow(16, heads=2, window=18, sinks=0, causal=True, bias=True)) < 0.4


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda: make(group=0), "group must be at least 1, got 0"),
    (lambda: make(window=0), "window must be at least 1, got 0"),
    (lambda: make(pool_scope="all"), "pool_scope must be one of head, shared, got 'all'"),
    (lambda: make(gqa_query="last"), "gqa_query must be one of mean, first"),
    (lambda: make(core_pos="end"), "core_pos must be one of last, first, middle, pooled"),
    (lambda: make(position=ALiBi(4)), "position must be a Rotary or None, got ALiBi"),
    (lambda: make(causal=False), "causal must be True"),
    (lambda: make()(tokens(), tokens()), "takes no context"),
    (lambda: make()(tokens(), pattern=Causal()), "takes no pattern"),
    (lambda: make()(tokens(), state=make(group=5).initial_state(2)), "state belongs to another model"),
    (lambda: make()(tokens(), state=make().initial_state(3)), "state belongs to another model or batch"),
])  # fmt: skip
def test_errors_name_what_is_wrong(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
