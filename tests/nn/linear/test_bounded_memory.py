"""Bounded memory: the recurrence against softmaxes over prefixes, what the release forgets, its limit, its padding."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnlab.cost import count_flops
from attnlab.nn.linear.bounded_memory import BoundedMemory
from attnlab.nn.multihead import MultiHead

D = torch.float64


def module(**keywords) -> BoundedMemory:
    m = BoundedMemory(**{"dim": 16, "heads": 2, "slots": 5, **keywords}).double().eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return m


def by_hand(m: BoundedMemory, x: Tensor, context: Tensor) -> Tensor:
    """Query by query: slots are softmaxes over what it may see, all of it or the tokens up to its own."""
    (q, _, _), (_, k, v) = m.qkv(x), m.qkv(context)
    heads = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(m.heads):
            for n in range(x.shape[1]):
                seen = slice(0, n + 1 if m.causal else None)
                keys, values = k[b, h, seen], v[b, h, seen]
                slot_k = (keys @ m.ck).softmax(0).T @ keys
                slot_v = (values @ m.cv).softmax(0).T @ values
                heads[b, h, n] = (slot_k @ q[b, h, n] / m.head_dim**0.5).softmax(0) @ slot_v
    return m.merge(heads)


@pytest.mark.parametrize(("causal", "context_length"), [(False, 21), (True, 35), (True, 20), (True, 50)])
def test_equals_softmaxes_over_what_is_seen(causal: bool, context_length: int) -> None:
    m, x, context = module(causal=causal), torch.randn(2, 35, 16, dtype=D), torch.randn(2, context_length, 16, dtype=D)
    torch.testing.assert_close(m(x, context), by_hand(m, x, context))
    torch.testing.assert_close(m(x), by_hand(m, x, x))


def test_gradients_of_the_recurrence_are_right() -> None:
    m = module(causal=True, dim=4, heads=1, slots=2)
    assert torch.autograd.gradcheck(m, torch.randn(1, 19, 4, dtype=D, requires_grad=True))


def test_the_recurrence_is_stable_where_logits_drift_far() -> None:
    """Logits that grow by the thousand, or fall: no exponential overflows, and no average is of nothing."""
    m = module(causal=True, dim=4, heads=1, bias=False)
    x = torch.randn(1, 40, 4, dtype=D) * torch.linspace(1, 300, 40, dtype=D)[:, None]
    for tokens in (x, x.flip(1)):
        alpha = m.qkv(tokens)[1] @ m.ck
        assert alpha.abs().max() > 200
        torch.testing.assert_close(m(tokens), by_hand(m, tokens, tokens))
        single = m.float()(tokens.float())
        assert single.isfinite().all()
        m.double()


def test_the_release_forgets_what_the_recurrence_remembers() -> None:
    """A slot that the first token fills: the paper's still gives its value at the end, the release's nothing."""
    q, k, v = torch.randn(3, 1, 1, 40, 4, dtype=D)
    alpha, beta, heads = torch.zeros(1, 1, 40, 1, dtype=D), torch.zeros(1, 1, 40, 1, dtype=D), {}
    beta[:, :, 0] = 30.0
    for variant in ("paper", "release"):
        m = module(dim=4, heads=1, slots=1, causal=True, variant=variant)
        heads[variant] = m.recall(q, k, v, alpha, beta, m.initial_state(1))[0]
    torch.testing.assert_close(heads["paper"], v[:, :, :1].expand_as(v), atol=1e-10, rtol=0)
    assert heads["release"][:, :, 1:].abs().max() < 1e-10


def test_with_a_sharp_slot_for_each_token_it_is_softmax_attention() -> None:
    m = module(dim=32, heads=1, slots=6, bias=False)
    x = torch.randn(1, 6, 32, dtype=D)
    _, k, v = m.qkv(x)
    with torch.no_grad():
        for compress, t in ((m.ck, k), (m.cv, v)):
            compress.copy_(400 * torch.linalg.pinv(t[0, 0]))  # t @ compress is 400 times the unit matrix
    plain = MultiHead(32, heads=1).double()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if n[0] == "w"})
    torch.testing.assert_close(m(x), plain(x))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_has_no_influence(causal: bool) -> None:
    m, x = module(causal=causal), torch.randn(2, 20, 16, dtype=D)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, :4], keep[1, 15:] = False, False
    other = torch.where(keep[..., None], x, 9 * torch.randn_like(x))
    torch.testing.assert_close(m(x, other, keep=keep), m(x, x, keep=keep))
    shown = x[:1, 4:]
    torch.testing.assert_close(m(x, x, keep=keep)[:1, 4:], m(shown, shown))


def test_the_causal_form_is_linear_in_the_length() -> None:
    m = BoundedMemory(16, heads=2, causal=True).eval()
    counts = [count_flops(m, torch.randn(1, n, 16)) for n in (256, 512)]
    assert counts[1] / counts[0] < 2.05


def test_against_sdpa_the_memory_is_what_differs() -> None:
    """Reading given slots is attention over them."""
    m, x = module(), torch.randn(2, 9, 16, dtype=D)
    q, k, v = m.qkv(x)
    slot_k, slot_v = (k @ m.ck).softmax(2).mT @ k, (v @ m.cv).softmax(2).mT @ v
    torch.testing.assert_close(m(x), m.merge(scaled_dot_product_attention(q, slot_k, slot_v)))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="slots"):
        BoundedMemory(16, slots=0)
    with pytest.raises(ValueError, match="variant"):
        BoundedMemory(16, variant="fast")
    with pytest.raises(ValueError, match="keep must be bool"):
        module()(torch.randn(2, 5, 16, dtype=D), keep=torch.ones(2, 5, 1, dtype=torch.bool))
