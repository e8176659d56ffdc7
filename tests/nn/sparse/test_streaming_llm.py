"""The sliding window with sinks: by its mask, in pieces, and in bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnlab.cost import count_flops
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.streaming_llm import SlidingWindow
from attnlab.patterns import Explicit, Window
from attnlab.positions import ALiBi, BucketBias, Rotary

DIM, WINDOW, SINKS = 24, 4, 2


def make(**keywords) -> SlidingWindow:
    torch.manual_seed(0)
    m = SlidingWindow(DIM, **{"heads": 4, "kv_heads": 2, "window": WINDOW, "sinks": SINKS, **keywords})
    return m.double().eval()


def plain(m: SlidingWindow) -> MultiHead:
    other = MultiHead(DIM, heads=4, kv_heads=2, position=m.position).double().eval()
    other.load_state_dict(m.state_dict())
    return other


def tokens(n: int = 13) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sinks", [0, 2])
def test_equals_full_attention_under_its_mask(causal: bool, sinks: int) -> None:
    m, x = make(causal=causal, sinks=sinks), tokens()
    seen = torch.zeros(13, 13, dtype=torch.bool)
    for i in range(13):
        for j in range(13):
            near = 0 <= i - j < WINDOW if causal else abs(i - j) < WINDOW
            seen[i, j] = near or (j < sinks and (j <= i or not causal))
    torch.testing.assert_close(m(x), plain(m)(x, pattern=Explicit(seen)))


@pytest.mark.parametrize("pieces", [[1] * 40, [1, 2, 1, 20, 1, 15], [40]], ids=str)
@pytest.mark.parametrize(
    ("position", "places"),
    [(None, "text"), (Rotary(6), "text"), (ALiBi(4), "text"), (BucketBias(4, count=8, limit=16), "text"),
     (Rotary(6), "cache")],
    ids=["none", "rotary", "alibi", "buckets", "rotary in the cache"],
)  # fmt: skip
@pytest.mark.parametrize("sinks", [0, 2])
def test_pieces_give_what_the_whole_gives(position, places: str, sinks: int, pieces: list[int]) -> None:
    m, x = make(causal=True, position=position, places=places, sinks=sinks), tokens(40)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x), rtol=1e-9, atol=1e-9)


def test_sinks_in_the_cache_stand_right_before_the_window() -> None:
    """StreamingLLM's rule by hand: at each step the kept tokens are numbered from 0 and turned anew."""
    m, x = make(causal=True, position=Rotary(6), places="cache"), tokens()
    q, k, v = m.qkv(x)
    rotary, out = m.position, []
    for i in range(13):
        kept = [j for j in range(i + 1) if j < SINKS or i - j < WINDOW]
        numbers = torch.arange(len(kept))
        keys = rotary.turn_to(k[:, :, kept], numbers).repeat_interleave(2, 1)
        query = rotary.turn_to(q[:, :, i : i + 1], numbers[-1:])
        out.append((query @ keys.mT / math.sqrt(6)).softmax(-1) @ v[:, :, kept].repeat_interleave(2, 1))
    torch.testing.assert_close(m(x), m.merge(torch.cat(out, 2)))


@pytest.mark.parametrize("places", ["text", "cache"])
def test_weights_are_those_that_mix_the_values(places: str) -> None:
    m, x = make(causal=True, position=Rotary(6), places=places), tokens()
    values = m.qkv(x)[2].repeat_interleave(2, 1)
    torch.testing.assert_close(m.merge(m.weights(x) @ values), m(x))


def test_no_distance_in_the_cache_exceeds_what_was_trained() -> None:
    """The output at the end of a long text is what a short text of the sinks and the window alone gives."""
    m, x = make(causal=True, position=Rotary(6), places="cache"), tokens(200)
    short = torch.cat((x[:, :SINKS], x[:, -WINDOW:]), 1)
    torch.testing.assert_close(m(x)[:, -1], m(short)[:, -1])
    far = make(causal=True, position=Rotary(6))
    assert not torch.allclose(far(x)[:, -1], far(short)[:, -1])


def test_decoding_keeps_window_and_sinks_and_does_the_same_work_at_any_length() -> None:
    m = make(causal=True, position=Rotary(6))
    state = m.initial_state(2)
    with torch.no_grad():
        _, state = m(tokens(50), state=state)
        early, size = count_flops(lambda: m(tokens(1), state=state)), state.bytes()
        _, state = m(tokens(1000), state=state)
        late = count_flops(lambda: m(tokens(1), state=state))
    assert early == late
    assert state.bytes() == size == 2 * 2 * 2 * (WINDOW + SINKS) * 6 * 8  # k and v, batch, heads, places, D, float64


def test_information_travels_a_window_less_one_per_layer_besides_the_sinks() -> None:
    reach = make(causal=True, sinks=0).pattern.reach(3, 30)
    assert int(reach[29].nonzero()[0]) == 29 - 3 * (WINDOW - 1)


def test_a_window_over_everything_is_full_attention() -> None:
    m, x = make(window=100), tokens()
    torch.testing.assert_close(m(x), plain(m)(x))


def test_a_pattern_given_with_the_call_narrows_it() -> None:
    x = tokens()
    torch.testing.assert_close(
        make(causal=True, sinks=0)(x, pattern=Window(2)), make(causal=True, sinks=0, window=2)(x)
    )


def test_gradients_pass_through_relocated_sinks() -> None:
    m = make(causal=True, position=Rotary(6), places="cache")
    assert torch.autograd.gradcheck(lambda x: m(x), tokens(8)[:1].requires_grad_())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: make(window=0), "size must be an integer of at least 1"),
        (lambda: make(sinks=-1), "sinks must be 0 or more"),
        (lambda: make(places="here"), "places must be"),
        (lambda: make(causal=True, places="cache"), "needs causal=True and a Rotary"),
        (lambda: make(places="cache", position=Rotary(6)), "needs causal=True and a Rotary"),
        (lambda: make().initial_state(2), "causal=True"),
    ],
)
def test_errors_name_what_is_wrong(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_cache_without_the_past_takes_no_further_pattern() -> None:
    m = make(causal=True)
    with pytest.raises(ValueError, match="takes no pattern"):
        m(tokens(2), state=m.initial_state(2), pattern=Window(2))
