"""Gated attention: its places by hand, and what its gate promises."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attnlab.models.skeletons.decoder import Decoder
from attnlab.nn.mechanism import split_heads
from attnlab.nn.multihead import MultiHead
from attnlab.nn.softmax.gated import GatedAttention
from attnlab.positions import Rotary

DIM, HEADS, KV = 24, 4, 2


def make(**keywords) -> GatedAttention:
    torch.manual_seed(0)
    return GatedAttention(DIM, heads=HEADS, kv_heads=KV, **keywords).double().eval()


def baseline(m: GatedAttention) -> MultiHead:
    plain = MultiHead(DIM, heads=HEADS, kv_heads=KV, causal=m.causal, bias=m.wo.bias is not None).double().eval()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if n.split(".")[0] in ("wqkv", "wo")})
    return plain


def tokens(n: int = 7) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64)


def by_hand(m: GatedAttention, x: Tensor, context: Tensor, gate: str, at: str) -> Tensor:
    """The five places of the paper's figure, written out once more."""
    d = m.head_dim
    wq, wk, wv = m.wqkv.weight.split([HEADS * d, KV * d, KV * d])
    q, k, v = x @ wq.T, context @ wk.T, context @ wv.T

    def gated(y: Tensor, source: Tensor) -> Tensor:
        scores = torch.sigmoid(source @ m.wg.weight.T)
        # A score per head stands for all of the head's channels.
        return y * (scores if gate == "element" else scores.repeat_interleave(d, -1))

    q = gated(q, x) if at == "queries" else q
    k = gated(k, context) if at == "keys" else k
    v = gated(v, context) if at == "values" else v
    out = []
    for h in range(HEADS):
        mine, theirs = slice(h * d, (h + 1) * d), slice(h // (HEADS // KV) * d, (h // (HEADS // KV) + 1) * d)
        scores = torch.einsum("bic,bjc->bij", q[..., mine], k[..., theirs]) / d**0.5
        out.append(scores.softmax(-1) @ v[..., theirs])
    y = torch.cat(out, -1)
    y = (gated(y, x) if at == "heads" else y) @ m.wo.weight.T
    return gated(y, x) if at == "output" else y


@pytest.mark.parametrize(
    ("gate", "at"),
    [p for p in itertools.product(("head", "element"), ("heads", "values", "keys", "queries", "output"))
     if p != ("head", "output")],
)  # fmt: skip
def test_equals_the_definition_at_each_place(gate: str, at: str) -> None:
    m, x, context = make(gate=gate, at=at), tokens(), tokens(5)
    torch.testing.assert_close(m(x), by_hand(m, x, x, gate, at))
    torch.testing.assert_close(m(x, context), by_hand(m, x, context, gate, at))


@pytest.mark.parametrize("gate", ["head", "element"])
def test_an_open_gate_is_no_gate_and_zero_scores_halve_the_heads(gate: str) -> None:
    m, x = make(gate=gate, bias=True, causal=True), tokens()
    plain = baseline(m)
    nn.init.zeros_(m.wg.weight)
    nn.init.constant_(m.wg.bias, 1e3)
    torch.testing.assert_close(m(x), plain(x))
    nn.init.zeros_(m.wg.bias)
    torch.testing.assert_close(m(x) - m.wo.bias, 0.5 * (plain(x) - plain.wo.bias))


def test_a_head_can_say_nothing() -> None:
    m, x = make(bias=True), tokens()
    nn.init.zeros_(m.wg.weight)
    nn.init.constant_(m.wg.bias, -1e3)
    torch.testing.assert_close(m(x), m.wo.bias.expand(2, 7, DIM))


def test_without_a_gate_it_is_the_baseline() -> None:
    m, x = make(gate=None), tokens()
    assert torch.equal(m(x), baseline(m)(x))
    assert m.wg is None and m.scores is None


def test_shared_constant_and_additive_gates() -> None:
    x = tokens()
    shared = make(shared=True)
    assert shared.wg.weight.shape == (1, DIM)
    one = shared.wg(x).sigmoid()
    q, k, v = shared.project(x)
    torch.testing.assert_close(shared(x), (one * baseline(shared)(x)))
    constant = make(content=False, gate="element")
    assert constant.wg is None
    torch.testing.assert_close(constant(x), 0.5 * baseline(constant)(x))
    added = make(combine="add", activation="silu", gate="element")
    scores = split_heads(nn.functional.silu(added.wg(x)), HEADS)
    q, k, v = added.project(x)
    torch.testing.assert_close(added(x), added.merge(added.mix(q, k, v, x=x) + scores))


@pytest.mark.parametrize("at", ["heads", "values", "keys", "queries", "output"])
def test_pieces_give_what_the_whole_gives_at_each_place(at: str) -> None:
    m, x = make(gate="element", at=at, causal=True), tokens(9)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in x.split([4, 1, 1, 3], 1):
            y, state = m(piece, state=state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), m(x))


def test_the_gate_costs_what_the_paper_says() -> None:
    def count(m: nn.Module) -> int:
        return sum(p.numel() for p in m.parameters())

    plain = count(make(gate=None))
    assert count(make(gate="head")) - plain == DIM * HEADS
    assert count(make(gate="element")) - plain == DIM * HEADS * make().head_dim


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(gate="row"), "gate must be one of head, element, None"),
        (dict(at="G1"), "at must be one of"),
        (dict(combine="divide"), "combine must be one of"),
        (dict(activation="relu"), "activation must be one of"),
        (dict(at="output"), "gate must be 'element' at 'output'"),
    ],
)
def test_errors_name_what_is_wrong(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**keywords)


def test_gates_per_element_equal_those_of_qwen3_next(transformers) -> None:
    """Its projection holds query and gate of each head in turn, its norms scale by 1 + weight, a quarter turns."""
    next_ = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = transformers.Qwen3NextConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=8, attention_bias=False,
        partial_rotary_factor=0.5, rope_theta=10000.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs, x = next_.Qwen3NextAttention(config, 0).double().eval(), tokens()
    turned = next_.Qwen3NextRotaryEmbedding(config)(x, torch.arange(7)[None])
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    wanted = theirs(x, tuple(t.double() for t in turned), mask)[0]
    ours = GatedAttention(
        DIM, heads=HEADS, kv_heads=KV, head_dim=8, gate="element", causal=True, position=Rotary(8, dim=4),
        qk_norm=partial(nn.RMSNorm, eps=config.rms_norm_eps),
    ).double()  # fmt: skip
    q, gate = theirs.q_proj.weight.unflatten(0, (HEADS, 2, 8)).unbind(1)
    with torch.no_grad():
        ours.wqkv.weight.copy_(torch.cat((q.flatten(0, 1), theirs.k_proj.weight, theirs.v_proj.weight)))
        ours.wg.weight.copy_(gate.flatten(0, 1))
        ours.wo.weight.copy_(theirs.o_proj.weight)
        ours.q_norm.weight.copy_(1 + theirs.q_norm.weight)
        ours.k_norm.weight.copy_(1 + theirs.k_norm.weight)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-5, atol=1e-6)


def idle_attention(mixer: str, *, steps: int = 600, length: int = 32, letters: int = 20) -> tuple[float, float]:
    """Loss, and the first token's share of the attention of queries that need none.

    Texts follow a chain of letter pairs, but after a trigger (letters 1, 2) the letter before it comes again. Without
    an MLP that could undo it, what an idle head writes spoils the prediction, so softmax looks for a place to rest.
    """
    torch.manual_seed(0)
    table = torch.distributions.Dirichlet(torch.full((letters + 1,), 0.1)).sample((letters + 1,))
    table[:, 0] = 0
    model = Decoder(vocabulary=letters + 1, dim=32, depth=1, heads=1, mixer=mixer, mlp=lambda layer: None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def texts(count: int) -> Tensor:
        ids = torch.zeros(count, length + 1, dtype=torch.long)
        for n in range(length):
            drawn = torch.multinomial(table[ids[:, n]], 1)[:, 0]
            trigger = (ids[:, n] >= 1) & (ids[:, n] <= 2) & (n >= 2)
            ids[:, n + 1] = torch.where(trigger, ids[:, n - 1], drawn)
        return ids

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, step / 30, 0.05 + 2 * (1 - step / steps))
        ids = texts(32)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        ids = texts(512)
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
        weights = model.blocks[0].mixer.weights(model.blocks[0].norm1(model.embedding(ids[:, :-1])))[:, 0, :, 0]
        idle = (ids[:, :-1] > 2) & (torch.arange(length) >= length // 4)
    return loss.item(), weights[idle].mean().item()


@pytest.mark.slow
def test_a_gate_lets_an_idle_head_rest_elsewhere_than_on_the_first_token() -> None:
    """The paper's claim: with the gate no attention sink forms, and the loss is no higher."""
    loss, sink = idle_attention("multihead")
    gated_loss, gated_sink = idle_attention("gated")
    assert sink > 2 / 20  # a query of 8 to 31 keys would give it about 1/20 without preference
    assert gated_sink < 0.5 * sink
    assert gated_loss < loss
