"""Attention to the nearest keys: equal to a masked softmax, blind to the rest, and one word for all tokens."""

import pytest
import torch

from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.nearest_keys import NearestKeys


def built(**settings) -> NearestKeys:
    return NearestKeys(16, **{"heads": 2, "keep": 3, "alpha": 0.5, **settings}).double()


def masked(m: NearestKeys, x: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads and values by torch's own attention under a mask of the k largest scores."""
    q, k, v = m.project(x)
    scores = q @ k.mT
    seen = scores >= scores.topk(keep).values[..., -1:]
    assert (seen.sum(-1) == keep).all()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen), v


@pytest.mark.parametrize("context", ["output", "values", "input"])
def test_equals_a_masked_softmax_and_its_context(context: str) -> None:
    m, x = built(context=context), torch.randn(2, 9, 16, dtype=torch.float64)
    heads, v = masked(m, x, 3)
    joined = heads.transpose(1, 2).flatten(2)
    what = {"output": joined, "values": v.transpose(1, 2).flatten(2), "input": x}[context]
    torch.testing.assert_close(m(x), m.wo(joined + 0.5 * what.mean(1, keepdim=True)))


def test_all_keys_and_no_context_are_softmax_attention() -> None:
    m, x = built(keep=1.0, alpha=0.0), torch.randn(2, 9, 16, dtype=torch.float64)
    plain = MultiHead(16, heads=2, bias=True).double()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if n != "alpha"})
    torch.testing.assert_close(m(x), plain(x))


def test_one_key_gives_its_value() -> None:
    m, x = built(keep=1, alpha=0.0), torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = m.project(x)
    best = (q @ k.mT).argmax(-1)
    torch.testing.assert_close(m(x), m.merge(v.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, 8))))


def test_a_share_is_rounded_up_of_the_length() -> None:
    m = NearestKeys(16, heads=2, keep=0.7)
    assert [m.count(n) for n in (1, 2, 10, 11)] == [1, 2, 7, 8]
    assert NearestKeys(16, heads=2, keep=20).count(9) == 9
    weights = NearestKeys(16, heads=2, keep=0.5).weights(torch.randn(1, 8, 16))
    assert ((weights > 0).sum(-1) == 4).all()


def test_keys_that_are_not_kept_have_no_gradient_and_their_values_no_effect() -> None:
    m, x = built(alpha=0.0), torch.randn(1, 9, 16, dtype=torch.float64)
    q, k, v = (t.detach().requires_grad_() for t in m.project(x))
    heads = m.mix(q, k, v, x=x)
    at = (q @ k.mT)[0, 0, 0].topk(3).indices
    others = [i for i in range(9) if i not in at]
    key, value = torch.autograd.grad(heads[0, 0, 0].pow(2).sum(), (k, v))
    assert not key[0, 0, others].any() and not value[0, 0, others].any()
    assert key[0, 0, at].any(-1).all() and value[0, 0, at].any(-1).all()


def test_the_context_is_the_same_for_every_token() -> None:
    quiet, loud, x = built(alpha=0.0), built(alpha=2.0), torch.randn(2, 9, 16, dtype=torch.float64)
    loud.load_state_dict({**quiet.state_dict(), "alpha": loud.alpha})
    added = loud(x) - quiet(x)
    torch.testing.assert_close(added, added[:, :1].expand_as(added))
    assert added.any()


def test_what_does_not_fit_is_named() -> None:
    for settings, name in (
        ({"keep": 0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"context": "mean"}, "context"),
        ({"causal": True}, "causal"),
    ):
        with pytest.raises(ValueError, match=name):
            built(**settings)
    with pytest.raises(ValueError, match="context"):
        built()(torch.randn(1, 3, 16).double(), torch.randn(1, 3, 16).double())
