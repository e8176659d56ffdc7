"""The decoder: its mathematics by hand, any mixer in it, and generation with a state."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import attnlab
from attnlab.cards import ANY_GRID, STREAMING, TOKENS
from attnlab.hub.checkpoints import load_official
from attnlab.hub.official import find
from attnlab.models.skeletons.decoder import Decoder, sample
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.streaming_llm import SlidingWindow
from attnlab.positions import Llama3, Rotary, YaRN

SMALL = dict(vocabulary=50, dim=32, depth=2, heads=4, kv_heads=2, hidden=48)


def make(**keywords) -> Decoder:
    torch.manual_seed(0)
    m = Decoder(**{**SMALL, **keywords})
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m.double().eval()


def ids(n: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(0, 50, (batch, n))


def test_equals_llamas_equations() -> None:
    m, text = make(), ids(7)
    d, n = 8, 7

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    angle = torch.arange(n, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin

    x = m.embedding.weight[text]
    for block in m.blocks:
        y = rms(x, block.norm1.weight)
        wq, wk, wv = block.mixer.wqkv.weight.split([32, 16, 16])
        heads = []
        for h in range(4):
            mine, theirs = slice(h * d, h * d + d), slice(h // 2 * d, h // 2 * d + d)
            scores = turn(y @ wq[mine].T) @ turn(y @ wk[theirs].T).mT / math.sqrt(d)
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ (y @ wv[theirs].T))
        x = x + torch.cat(heads, -1) @ block.mixer.wo.weight.T
        y = rms(x, block.norm2.weight)
        gate = y @ block.mlp.w1.weight.T
        x = x + (gate * gate.sigmoid() * (y @ block.mlp.w3.weight.T)) @ block.mlp.w2.weight.T
    torch.testing.assert_close(m(text), rms(x, m.norm.weight) @ m.head.weight.T)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_equals_transformers_with_the_same_weights(family: str, transformers) -> None:
    config = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=family == "Qwen2",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    params, text = dict(theirs.state_dict()), ids()
    if config["tie_word_embeddings"]:
        del params["lm_head.weight"]
    ours = find("huggingface/transformers", f"{family}ForCausalLM").build({**config, "rope_theta": 10000.0}, params)
    with torch.no_grad():
        torch.testing.assert_close(ours(text), theirs(text).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(
            ours.generate(text, 5, temperature=0),
            theirs.generate(text, max_new_tokens=5, do_sample=False, pad_token_id=0),
        )


def test_reads_a_checkpoint_in_transformers_layout_with_a_tied_head(tmp_path) -> None:
    m = make(tied=True)
    theirs = {}
    for name, tensor in m.state_dict().items():
        name = name.replace("embedding.", "model.embed_tokens.").replace("blocks.", "model.layers.")
        for ours, official in (
            ("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm"), ("mixer.wo", "self_attn.o_proj"),
            ("mlp.w1", "mlp.gate_proj"), ("mlp.w3", "mlp.up_proj"), ("mlp.w2", "mlp.down_proj"),
        ):  # fmt: skip
            name = name.replace(ours, official)
        if name.endswith("wqkv.weight"):
            for part, rows in zip("qkv", tensor.split([32, 16, 16]), strict=True):
                theirs[name.replace("mixer.wqkv", f"self_attn.{part}_proj")] = rows
        elif name == "norm.weight":
            theirs["model.norm.weight"] = tensor
        elif name != "head.weight":
            theirs[name] = tensor
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    other = make(tied=True)
    nn.init.zeros_(other.embedding.weight)
    save_file({n: t.contiguous() for n, t in theirs.items()}, tmp_path / "model.safetensors")
    load_official(other, tmp_path / "model.safetensors")
    text = ids()
    assert torch.equal(other(text), m(text))


STREAMS = [
    name for name in attnlab.names(kind=TOKENS, capability=STREAMING) if not attnlab.describe(name).claims(ANY_GRID)
]


@pytest.mark.parametrize("name", STREAMS)
def test_every_streaming_mechanism_streams_in_it(name: str) -> None:
    options = {k: v for k, v in attnlab.describe(name).sample.items() if k not in ("heads", "kv_heads")}
    m, text = make(kv_heads=None, mixer=name, mixer_options=options), ids(20)
    state, out = m.initial_state(2), []
    with torch.no_grad():
        for piece in text.split([9, 1, 1, 9], 1):
            logits, state = m(piece, state)
            out.append(logits)
        whole = m(text)
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-7, atol=1e-7)
    assert state.length == 20


@pytest.mark.parametrize(
    "keywords",
    [dict(position="alibi"), dict(position="learned", length=20), dict(position="none"), dict(tied=True),
     dict(position=Rotary(8, interleaved=True)), dict(rope_scaling=YaRN(4.0)), dict(rope_scaling=Llama3(8.0)),
     dict(head_dim=16), dict(mixer_options=dict(qk_norm=nn.RMSNorm, bias=True)),
     dict(mixer=["multihead", "sliding_window"], mixer_options=dict(qk_norm=nn.RMSNorm), depth=3),
     dict(mixer=lambda layer: SlidingWindow(32, heads=4, causal=True, window=4 + layer, position=Rotary(8)))],
    ids=lambda keywords: ", ".join(keywords) or "plain",
)  # fmt: skip
def test_generation_with_a_state_equals_generation_without(keywords: dict) -> None:
    m, text = make(**keywords), ids(9)
    cached = m.generate(text, 8, temperature=0)
    assert torch.equal(cached, m.generate(text, 8, temperature=0, cached=False))
    assert torch.equal(cached[:, :9], text) and cached.shape == (2, 17)


def test_each_layer_of_a_hybrid_has_its_own_mixer() -> None:
    m = make(mixer=["sliding_window", "sliding_window", "multihead"], depth=7)
    kinds = [type(b.mixer) for b in m.blocks]
    assert kinds == [SlidingWindow, SlidingWindow, MultiHead] * 2 + [SlidingWindow]
    assert len({id(b.mixer.position) for b in m.blocks}) == 1


def test_mixers_of_a_hybrid_take_keywords_of_their_own() -> None:
    m = make(mixer=[("sliding_window", dict(window=3)), ("sliding_window", dict(window=9)), "multihead"], depth=4)
    assert [getattr(b.mixer, "window", None) for b in m.blocks] == [3, 9, None, 3]


def test_sampling_follows_the_generator_and_the_top_k() -> None:
    m, text = make(), ids(4)
    draw = [m.generate(text, 6, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    greedy = m.generate(text, 6, temperature=0)
    assert torch.equal(m.generate(text, 6, top_k=1), greedy)
    assert torch.equal(m.generate(text, 6, temperature=1e-4), greedy)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    drawn = torch.cat([sample(logits, top_k=2) for _ in range(200)])
    assert set(drawn.flatten().tolist()) == {2, 3}


def test_sampling_matches_the_softmax_of_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    drawn = sample(logits.expand(20000, 3), temperature=2.0, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn.flatten()) / 20000
    assert ((share - (logits[0] / 2).softmax(0)).abs() < 0.015).all()  # four standard errors


def test_a_text_ends_at_its_stop() -> None:
    m, text = make(), ids(4)
    free = m.generate(text, 10, temperature=0)
    stop = int(free[0, 6])
    stopped = m.generate(text, 10, temperature=0, stop=stop)
    for row, other in zip(stopped, free, strict=True):
        end = next((i for i in range(4, len(other)) if other[i] == stop), len(other))
        assert torch.equal(row[: end + 1], other[: end + 1][: len(row)])
        assert (row[end:] == stop).all()


def test_last_gives_the_last_logits_alone() -> None:
    m, text = make(), ids()
    torch.testing.assert_close(m(text, last=True), m(text)[:, -1:])


def test_a_cloned_state_goes_its_own_way() -> None:
    m, text = make(mixer=["multihead", "sliding_window", "affine"], depth=3), ids(12)
    with torch.no_grad():
        _, state = m(text[:, :8], m.initial_state(2))
        other = state.clone()
        m(ids(6), other)
        logits, _ = m(text[:, 8:], state)
        torch.testing.assert_close(logits, m(text)[:, 8:])


def test_it_starts_at_the_loss_of_chance_and_learns() -> None:
    torch.manual_seed(0)
    m, text = Decoder(**SMALL), ids(33, batch=8)
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(m(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    assert loss().item() == pytest.approx(math.log(50), abs=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 1.0


def test_a_failed_call_leaves_the_state_as_it_was() -> None:
    m, text = make(length=10), ids(8)
    with torch.no_grad():
        _, state = m(text, m.initial_state(2))
        with pytest.raises(ValueError, match="position 13, but the model's length is 10"):
            m(ids(5), state)
        logits, _ = m(text[:, :1], state)
    assert state.length == 9 and logits.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: make()(ids()[0]), ValueError, "ids must have shape"),
        (lambda: make()(ids()[:, :0]), ValueError, "not empty"),
        (lambda: make()(ids().float()), TypeError, "integers"),
        (lambda: make(vocabulary=0), ValueError, "vocabulary must be at least 1"),
        (lambda: make(kv_heads=3), ValueError, "kv_heads must divide"),
        (lambda: make(mixer="multihed"), ValueError, "did you mean"),
        (lambda: make(mixer=[]), ValueError, "mixer must be one or a list"),
        (lambda: make(mixer=["multihead"] * 3), ValueError, "list of 1 to depth = 2, got 3"),
        (lambda: make(mixer=lambda layer: nn.Identity(), mixer_options=dict(a=1)), ValueError, "mixer_options"),
        (lambda: make(position="absolute"), ValueError, "position must be rotary"),
        (lambda: make(position="learned"), ValueError, "length must be given"),
        (lambda: make(length=8)(ids(9)), ValueError, "position 9, but the model's length is 8"),
        (lambda: make(length=8).generate(ids(9), 1), ValueError, "position 9, but the model's length is 8"),
        (lambda: make(length=8).generate(ids(5), 5), ValueError, "reach 10 tokens, but the model's length is 8"),
        (lambda: make().generate(ids(), -1), ValueError, "max_new_tokens must be 0 or more"),
        (lambda: make().generate(ids(), 1, temperature=-1.0), ValueError, "temperature must be 0 or more"),
        (lambda: make().generate(ids(), 1, top_k=0), ValueError, "top_k must be at least 1"),
        (lambda: make()(ids(batch=3), make().initial_state(2)), ValueError, "batch of 2, got ids of 3"),
        (lambda: make(depth=1)(ids(), make().initial_state(2)), ValueError, "another model"),
        (lambda: make(mixer=lambda layer: nn.Identity()).generate(ids(), 1), ValueError, "Identity, does not stream"),
    ],
)
def test_errors_name_what_is_wrong(wrong, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


def test_mixers_that_do_not_stream_generate_without_a_state() -> None:
    m = make(mixer=lambda layer: nn.Identity())
    assert m.generate(ids(4), 3, cached=False).shape == (2, 7)
