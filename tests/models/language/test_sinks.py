"""The language models of the sink study: equal to transformers' Llama, and each change is what its name says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from attnlab import build, describe
from attnlab.hub import load_official
from attnlab.hub.official.llama import decoder
from attnlab.lens.sinks import measure_sinks
from attnlab.lens.toys.backcopy import Backcopy
from attnlab.models.language.sinks import GATED, PLAIN, SinkLM
from attnlab.positions import buckets

SMALL = dict(vocabulary=40, dim=32, depth=2, heads=4, hidden=48)
IDS = torch.arange(24).view(2, 12) * 7 % 40


def make(**keywords) -> SinkLM:
    torch.manual_seed(0)
    return SinkLM(**{**SMALL, **keywords}).double().eval()


def test_the_plain_one_is_llama(transformers) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").double().eval()
    model = make()
    model.load_state_dict(decoder(peer.state_dict()))
    with torch.no_grad():
        # Its rotations are in float32.
        torch.testing.assert_close(model(IDS), peer(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ffn", [*GATED, *PLAIN])
def test_each_feed_forward_by_its_formula(ffn: str) -> None:
    x, mlp = torch.randn(3, 32, dtype=torch.float64), make(ffn=ffn).blocks[0].mlp
    function = {"swiglu": silu, "geglu": gelu, "reglu": relu, "swish": silu, "gelu": gelu, "relu": relu}[ffn]
    if ffn in GATED:
        wanted = (function(x @ mlp.w1.weight.T) * (x @ mlp.w3.weight.T)) @ mlp.w2.weight.T
    else:
        wanted = function(x @ mlp.fc1.weight.T) @ mlp.fc2.weight.T
    torch.testing.assert_close(mlp(x), wanted)


def seen(model: SinkLM) -> Tensor:
    """Which of 12 tokens the logits after each depend on, by gradient, in one layer."""
    x = model.embedding(IDS[:1]).detach().requires_grad_()
    y = model.blocks[0](x)
    return torch.stack(
        [torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0 for i in range(12)]
    )


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("mixer", ["multihead", "kv_bias", "similarity", "kernel"])
def test_windows_and_prefixes_reach_as_far_as_they_say(mixer: str, post_norm: bool) -> None:
    i, j = torch.arange(12)[:, None], torch.arange(12)
    for keywords, wanted in (
        ({}, j <= i),
        (dict(window=3), (j <= i) & (i - j < 3)),
        (dict(prefix=4), (j <= i) | (j < 4)),
    ):
        assert torch.equal(seen(make(mixer=mixer, post_norm=post_norm, **keywords)), wanted)


def test_post_norm_stands_after_the_sum_and_nowhere_else() -> None:
    model = make(post_norm=True)
    block, x = model.blocks[0], torch.randn(1, 5, 32, dtype=torch.float64)
    y = block.norm1(x + block.mixer(x))
    torch.testing.assert_close(block(x), block.norm2(y + block.mlp(y)))
    assert isinstance(model.norm, torch.nn.Identity)


def test_sinusoids_are_added_to_the_embeddings() -> None:
    model = make(position="sinusoid")
    x = torch.zeros(1, 3, 32, dtype=torch.float64)
    place = model.learned(x, 2)[0]
    for n in range(3):
        for c in range(32):
            angle = (2 + n) / 10000 ** (2 * (c % 16) / 32)
            assert place[n, c].item() == pytest.approx(math.sin(angle) if c < 16 else math.cos(angle), abs=1e-5)
    assert not torch.allclose(model(IDS), make(position="none")(IDS))


def test_the_released_relative_bias_favours_what_is_far_away() -> None:
    model = make(position="relative", variant="release")
    assert not any("table" in name for name in dict(model.named_parameters()))
    bias = model.blocks[0].mixer.position_bias(torch.zeros(1, 4, 12, 8), torch.zeros(1, 4, 12, 8))
    zero, i, j = torch.zeros((), dtype=torch.long), torch.arange(12)[:, None], torch.arange(12)
    assert torch.equal(bias(zero, zero, i, j).long(), buckets(i - j))
    learned = make(position="relative")
    assert learned.blocks[0].mixer.position.table.shape == (32, 4)


def test_the_released_rotations_are_rounded() -> None:
    exact, coarse = make(), make(variant="release")
    coarse.load_state_dict(exact.state_dict())
    difference = (exact(IDS) - coarse(IDS)).abs().max()
    assert 1e-5 < difference < 1e-1


def test_starts_as_the_authors_start() -> None:
    model = SinkLM(vocabulary=1000, dim=128, depth=4, heads=4, hidden=256)
    assert model.embedding.weight.std().item() == pytest.approx((0.4 / 128) ** 0.5, rel=0.02)
    assert model.blocks[1].mixer.wqkv.weight.std().item() == pytest.approx((0.4 / 128) ** 0.5, rel=0.02)
    assert model.blocks[1].mlp.w2.weight.std().item() == pytest.approx(256**-0.5 / 4, rel=0.03)


def test_the_sheet_of_sizes() -> None:
    sizes = describe("sink_lm").sizes
    assert sizes["tinyllama_60m"].params == 136_462_080
    with torch.device("meta"):
        model = build("tinyllama_60m")
    assert sum(p.numel() for p in model.parameters()) - 2 * 50432 * 768 == 58_998_528
    assert len(sizes) == 45


def test_a_checkpoint_of_theirs_is_put_in_order(tmp_path) -> None:
    """Rows of each group: its queries, its key, its value."""
    model = make(kv_heads=2)
    official, d = {}, 8
    for name, tensor in model.state_dict().items():
        name = name.replace("blocks.", "transformer.h.").replace("mixer.", "attn.").replace("norm1", "norm_1")
        name = name.replace("norm2", "norm_2").replace("embedding", "transformer.wte").replace("attn.wo", "attn.proj")
        name = (
            name.replace("mlp.w1", "mlp.swiglu.w1")
            .replace("mlp.w2", "mlp.swiglu.w3")
            .replace("mlp.w3", "mlp.swiglu.w2")
        )
        name = {"norm.weight": "transformer.ln_f.weight", "head.weight": "lm_head.weight"}.get(name, name)
        if name.endswith("attn.wqkv.weight"):
            q, k, v = tensor.split([4 * d, 2 * d, 2 * d])
            rows = [torch.cat((q[2 * g * d : 2 * (g + 1) * d], k[g * d :][:d], v[g * d :][:d])) for g in range(2)]
            name, tensor = name.replace("wqkv", "attn"), torch.cat(rows)
        official[name] = tensor
    torch.save({"model": official}, tmp_path / "theirs.pth")
    other = SinkLM(**SMALL, kv_heads=2).double().eval()
    load_official(other, tmp_path / "theirs.pth")
    assert torch.equal(other(IDS), model(IDS))


def test_bad_input_is_named() -> None:
    for keywords, message in (
        (dict(ffn="tanh"), "ffn must be one of"),
        (dict(variant="new"), "variant must be"),
        (dict(window=3, prefix=2), "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**keywords)
    with pytest.raises(ValueError, match="streaming needs causal"):
        make(prefix=3).generate(IDS, 2)
    assert make(prefix=3).generate(IDS, 2, cached=False).shape == (2, 14)


@pytest.mark.slow
def test_softmax_makes_a_sink_where_attention_is_idle_a_key_bias_takes_it_and_sigmoids_need_none() -> None:
    """One layer and one head on back-copies, whose texts begin alike: after 800 steps 0.90, 0.00 (slot 0.84), 0.00."""
    task, found = Backcopy(), {}
    for name, keywords in {
        "softmax": {},
        "bias": dict(mixer="kv_bias", mixer_options=dict(value=False)),
        "sigmoid": dict(mixer="similarity"),
    }.items():
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(0)
        model = SinkLM(vocabulary=task.vocabulary, dim=64, depth=1, heads=1, ffn="none", **keywords)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        for _ in range(500):
            ids, _ = task.batch(32, rng)
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[name] = measure_sinks(model.eval(), task.batch(64, rng)[0][:, :-1])
    first = {name: sinks.importance[0, 0, int(name == "bias")].item() for name, sinks in found.items()}
    assert first["softmax"] > 0.5 and first["sigmoid"] < 0.1 and first["bias"] < 0.1
    assert found["bias"].importance[0, 0, 0] > 0.4  # the slot
    drained = {name: (sinks.values[0, 0] / sinks.values[0].mean()).item() for name, sinks in found.items()}
    assert drained["softmax"] < 0.3 and drained["sigmoid"] > 0.6
