"""Watching: what is recorded of real models is what they do, as statistics too, in memory that grows with tokens."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnlab
from attnlab import lens
from attnlab.backends import stripes
from attnlab.lens.measures.weights import entropy, max_weight, mean_distance, received, sink_mass
from attnlab.patterns import Window

MEASURES = {"entropy": entropy, "received": received, "max": max_weight, "sink_mass": sink_mass}


def same_statistics(stats, weights):
    """Each number that was streamed equals that of the recorded weights, to float32 rounding."""
    assert stats.layers == weights.layers and len(stats)
    for name in weights:
        for field, measure in MEASURES.items():
            wanted = measure(weights[name])
            torch.testing.assert_close(getattr(stats[name], field), wanted, rtol=1e-5, atol=1e-5)
        wanted = mean_distance(weights[name], **weights.where(name))
        torch.testing.assert_close(stats[name].distance, wanted, rtol=1e-5, atol=1e-5)


def watched(call, model, **keywords):
    with torch.no_grad(), lens.watch(model, **keywords) as record:
        call()
    return record


def louder(model, std=0.3):
    """Weights far enough from zero that heads look somewhere."""
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)
    return model.eval()


class Heads(nn.Module):
    """Attention by torch's kernel, for masks of any kind."""

    def __init__(self, heads=4, kv_heads=2, dim=8):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.wq, self.wkv = nn.Linear(16, heads * dim), nn.Linear(16, 2 * kv_heads * dim)

    def forward(self, x, context=None, **keywords):
        k, v = self.wkv(x if context is None else context).chunk(2, -1)
        q, k, v = (
            t.unflatten(-1, (n, -1)).transpose(1, 2)
            for t, n in ((self.wq(x), self.heads), (k, self.kv_heads), (v, self.kv_heads))
        )
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **keywords)


class Stack(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Heads() for _ in range(depth))
        self.wo = nn.Linear(32, 16)

    def forward(self, x, **keywords):
        for layer in self.layers:
            x = x + self.wo(layer(x, **keywords).transpose(1, 2).flatten(2))
        return x


@pytest.fixture
def x():
    return torch.randn(2, 11, 16)


@pytest.fixture
def stack():
    return louder(Stack())


def test_the_weights_of_a_timm_vit_are_those_it_computes_unfused(timm):
    model = louder(timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2), std=0.05)
    image = torch.randn(2, 3, 48, 48)
    record = watched(lambda: model(image), model, grid=(3, 3))
    seen = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, a, y: seen.append(y))
    with torch.no_grad():
        model(image)
    for i, weights in enumerate(seen):
        torch.testing.assert_close(record[i], weights, rtol=1e-5, atol=1e-6)
    assert record.on_grid(record[1, 2][:, 0]).shape == (2, 3, 3) and record.prefix == 1
    for block in model.blocks:
        block.attn.fused_attn = True
    same_statistics(watched(lambda: model(image), model, keep="stats", grid=(3, 3)), record)


@pytest.mark.parametrize(("padded", "cache"), [(False, None), (True, None), (False, "static"), (True, "static")])
def test_generation_by_a_llama_is_one_matrix_equal_to_that_of_the_whole_text(transformers, padded, cache):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids, seen = torch.randint(2, 64, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    seen[0, :2] = 0 if padded else 1
    said = []

    def generate():
        text = model.generate(
            ids, attention_mask=seen, max_new_tokens=4, do_sample=False, cache_implementation=cache,
            disable_compile=True,
        )  # fmt: skip
        said.append(text)

    record = watched(generate, model)
    assert record.steps == (0, 1, 2, 3) and record[1].shape == (2, 4, 8, 8) and record[1, 3].shape == (2, 8, 8)
    assert record.step(2)[0].shape == (2, 4, 1, 8 if cache else 7)
    assert [e.offset for e in record.of(0)] == [0, 5, 6, 7]
    same_statistics(watched(generate, model, keep="stats"), record)
    text = said[0][:, :8]
    mask = torch.cat([seen, torch.ones(2, 3, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(text, attention_mask=mask, position_ids=places, output_attentions=True).attentions
    first = 2 if padded else 0  # what a padded query looks at is nobody's business
    for layer, wanted in enumerate(eager):
        torch.testing.assert_close(record[layer][:, :, first:], wanted[:, :, first:], rtol=1e-4, atol=1e-5)


def test_in_generation_the_grid_stays_where_it_was_in_the_prompt():
    llama = louder(attnlab.build("llama", vocabulary=64, dim=32, depth=1, heads=4, kv_heads=2, hidden=64))
    ids = torch.randint(0, 64, (1, 11))  # two words, 2 × 3 patches, three words

    def call():
        llama.generate(ids, 4, temperature=0.0)

    record = watched(call, llama, grid=(2, 3), prefix=2)
    assert record.where(0) == {"grid": (2, 3), "prefix": 2, "offset": 0}
    assert torch.equal(record.on_grid(record[0])[0, 1, 12], record[0][0, 1, 12, 2:8].view(2, 3))
    same_statistics(watched(call, llama, keep="stats", grid=(2, 3), prefix=2), record)
    inferred = watched(call, llama, grid=(2, 3))
    assert torch.equal(inferred.on_grid(inferred[0])[0, 1, 12], record[0][0, 1, 12, 5:11].view(2, 3))


def test_torchs_encoder_gives_the_weights_that_its_attention_would_return(x):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = louder(nn.TransformerEncoder(layer, 2))
    padding = torch.arange(11) >= torch.tensor([11, 8])[:, None]
    record = watched(lambda: model(x, src_key_padding_mask=padding), model)
    first = model.layers[0].self_attn
    _, wanted = first(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(record[0], wanted, rtol=1e-5, atol=1e-6)
    assert (record[1][1, :, :, 8:] == 0).all()
    same_statistics(watched(lambda: model(x, src_key_padding_mask=padding), model, keep="stats"), record)


def test_a_diffusers_unet_is_watched_in_its_cross_attention(torchvision_schemas):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=8,
    ).eval()  # fmt: skip
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 16))
    choice = dict(layers="*attn2", tokens=["a", "cat", "on", "a", "mat"])
    record = watched(lambda: model(*inputs), model, **choice)
    assert all(name.endswith("attn2") for name in record) and record[-1].shape[-1] == 5 == len(record.tokens)
    same_statistics(watched(lambda: model(*inputs), model, keep="stats", **choice), record)


def test_our_own_vision_transformer_and_decoder_are_watched_with_their_patterns():
    vit = louder(attnlab.build("vit", image=16, patch=4, dim=16, depth=2, heads=2, num_classes=3))
    image = torch.randn(1, 3, 16, 16)
    record = watched(lambda: vit(image), vit, grid=(4, 4))
    assert len(record) == 2 and record.where(0) == {"grid": (4, 4), "prefix": 1, "offset": 0}
    same_statistics(watched(lambda: vit(image), vit, keep="stats", grid=(4, 4)), record)
    llama = louder(attnlab.build("llama", vocabulary=64, dim=32, depth=2, heads=4, kv_heads=2, hidden=64))
    ids = torch.randint(0, 64, (1, 6))
    record = watched(lambda: llama.generate(ids, 4, temperature=0.0), llama)
    assert record[1].shape == (1, 4, 9, 9)
    assert record[1].triu(1).abs().max() == 0
    torch.testing.assert_close(record[1].sum(-1), torch.ones(record[1].shape[:-1]))
    same_statistics(watched(lambda: llama.generate(ids, 4, temperature=0.0), llama, keep="stats"), record)


def masks(n):
    hidden = torch.rand(2, 4, n, n, generator=torch.Generator().manual_seed(1)) < 0.4
    added = torch.randn(2, 4, n, n).masked_fill(hidden, -math.inf)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": ~hidden},
        "bool, all heads alike": {"attn_mask": ~hidden[:, :1]},
        "padding": {"attn_mask": ~hidden[:, :1, :1]},
        "added": {"attn_mask": added},
        "added to all alike": {"attn_mask": added[0, 0]},
        "lowest": {"attn_mask": torch.zeros(n, n).masked_fill(hidden[0, 0], torch.finfo(torch.float32).min)},
    }


@pytest.mark.parametrize("heads", [None, 2, [3, 0], slice(1, 3)], ids=str)
@pytest.mark.parametrize("mask", masks(2))
def test_statistics_are_those_of_the_weights_under_any_mask_and_for_some_heads(x, mask, heads):
    model, keywords = louder(Heads()), masks(11)[mask]
    every = watched(lambda: model(x, **keywords), model)
    record = watched(lambda: model(x, **keywords), model, heads=heads)
    stats = watched(lambda: model(x, **keywords), model, heads=heads, keep="stats")
    kept = range(4)[heads] if isinstance(heads, slice) else range(4) if heads is None else [heads]
    assert record.heads == tuple(sorted(heads if isinstance(heads, list) else kept))
    for head in record.heads:
        torch.testing.assert_close(record[0, head], every[0, head])
    same_statistics(stats, record)


def test_cross_attention_counts_positions_from_the_start(x):
    model, context = louder(Heads()), torch.randn(2, 7, 16)
    record = watched(lambda: model(x, context=context), model)
    assert record.entries[0].kind == "cross" and record.where(0)["offset"] == 0
    same_statistics(watched(lambda: model(x, context=context), model, keep="stats"), record)


def test_weights_times_values_are_the_recorded_outputs(stack, x):
    values = watched(lambda: stack(x), stack, keep=lambda event, out: event.v.repeat_interleave(2, 1))
    weights, outputs = (watched(lambda: stack(x), stack, keep=k) for k in ("weights", "outputs"))
    torch.testing.assert_close(weights.stack() @ values.stack(), outputs.stack(), rtol=1e-4, atol=1e-4)


def test_a_function_keeps_what_it_returns(stack, x):
    def keep(event, out):
        return {"norm": out.norm(dim=-1), "heads": event.heads} if event.layer != 1 else None

    record = watched(lambda: stack(x), stack, keep=keep)
    assert record.ordinals == (0, 2) and record[0]["norm"].shape == (2, 4, 11) and record[2]["heads"] == 4
    with pytest.raises(ValueError, match="has no axis of heads"):
        record[0, 1]
    with pytest.raises(TypeError, match=r"keep must return a tensor, .*; at layers.0 it returned str"):
        watched(lambda: stack(x), stack, keep=lambda event, out: "all")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.modules())


def test_what_is_watched_is_what_comes_of_edits(stack, x):
    class Sharpen(lens.Edit):
        def weights(self, event, weights):
            return self.put(event, weights.square() / weights.square().sum(-1, keepdim=True), weights)

    plain = watched(lambda: stack(x), stack, layers=0)
    with lens.steer(stack, Sharpen(heads=2)):
        record = watched(lambda: stack(x), stack, layers=0)
        stats = watched(lambda: stack(x), stack, layers=0, keep="stats", heads=[2, 1])
    wanted = plain[0, 2].square() / plain[0, 2].square().sum(-1, keepdim=True)
    torch.testing.assert_close(record[0, 2], wanted)
    torch.testing.assert_close(record[0, 1], plain[0, 1])
    torch.testing.assert_close(stats[0, 2].entropy, entropy(wanted))
    assert stats[0].lse.isnan().all()


def test_a_gradient_flows_through_what_is_recorded_if_it_is_wanted(stack, x):
    x.requires_grad_()
    with lens.watch(stack, detach=False, device=None) as record:
        stack(x)
    (gradient,) = torch.autograd.grad(entropy(record).sum(), x)
    assert gradient.abs().max() > 0 and gradient.isfinite().all()
    with lens.watch(stack) as record:
        stack(x)
    assert not record[0].requires_grad


def test_what_checkpointing_computes_again_is_not_recorded_again(x):
    model = Heads()
    with lens.watch(model) as record:
        torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert len(record.entries) == 1


def test_one_module_called_again_is_told_apart_by_call(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = Heads()

        def forward(self, x):
            return self.attend(x), self.attend(x * 2)

    model = Twice()
    record = watched(lambda: model(x), model)
    assert len(record) == 1 and not torch.equal(record.call(0)[0], record.call(1)[0])
    with pytest.raises(ValueError, match=r"choose by record.call\(…\) among 0, 1"):
        record[0]


def test_half_precision_is_weighed_in_float32_and_kept_as_asked(stack, x):
    model, x = stack.bfloat16(), x.bfloat16()
    assert watched(lambda: model(x), model)[0].dtype is torch.float32
    assert watched(lambda: model(x), model, dtype=torch.float16)[0].dtype is torch.float16
    stats = watched(lambda: model(x), model, keep="stats")
    same_statistics(stats, watched(lambda: model(x), model))


def test_statistics_under_autocast_are_those_of_what_it_attends(stack, x):
    def call():
        with torch.autocast("cpu", torch.bfloat16):
            stack(x)

    same_statistics(watched(call, stack, keep="stats"), watched(call, stack))


def test_a_running_state_gives_its_matrix_but_no_statistics():
    model, x = attnlab.build("kda", 16, heads=2).eval(), torch.randn(1, 6, 16)
    record, outputs = (watched(lambda: model(x), model, keep=k) for k in ("weights", "outputs"))
    values = watched(lambda: model(x), model, keep=lambda e, out: e.v)
    torch.testing.assert_close(record[0] @ values[0], outputs[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="keeps a running state, which has no statistics of softmax"):
        watched(lambda: model(x), model, keep="stats")
    assert watched(lambda: model(x), model, keep="weights", heads=1)[0, 1].equal(record[0, 1])


def test_another_weighting_has_weights_but_no_statistics_of_softmax(x):
    class By(nn.Module):
        def forward(self, x):
            q = x[:, None]
            return attnlab.attend(q, q, q, weighting="sigmoid", pattern=Window(3))

    model = By()
    assert watched(lambda: model(x), model)[0].shape == (2, 1, 11, 11)
    with pytest.raises(ValueError, match=r"statistics are of softmax attention, and .* weighs by Sigmoid"):
        watched(lambda: model(x), model, keep="stats")


def test_what_does_not_exist_is_said_with_what_does(stack, x):
    for choice, wrong in (
        (
            dict(layers=7),
            r"layers \[7\] do not attend in this model; those that do: 0 layers.0, 1 layers.1, 2 layers.2",
        ),
        (dict(layers="blocks.*"), r"layers \['blocks.\*'\] do not attend in this model; those that do: 0 layers.0"),
        (dict(heads=4), "heads of layers.0: 4 not there: there are 0 to 3"),
    ):
        with pytest.raises(ValueError, match=wrong):
            watched(lambda: stack(x), stack, **choice)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.modules())


def test_labels_and_grids_that_fit_nothing_are_refused(stack, x):
    with pytest.raises(ValueError, match=r"3 token labels do not fit the lengths recorded: \[11\]"):
        watched(lambda: stack(x), stack, tokens=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"grid 4 × 4 does not fit 11 tokens"):
        watched(lambda: stack(x), stack, grid=(4, 4))
    with pytest.raises(ValueError, match=r"grid must be positive integers \(height, width\), got \(0, 4\)"):
        watched(lambda: stack(x), stack, grid=(0, 4))
    with pytest.raises(ValueError, match="keep must be 'weights', 'stats', 'outputs' or a function"):
        watched(lambda: stack(x), stack, keep="everything")
    with pytest.raises(ValueError, match="statistics carry no gradient"):
        watched(lambda: stack(x), stack, keep="stats", detach=False)
    assert watched(lambda: stack(x), stack, tokens=[list("abcdefghijk")] * 2).tokens[1][10] == "k"


def test_an_exception_in_the_model_is_the_one_that_is_seen(stack, x):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        watched(lambda: stack(x[..., :5]), stack, tokens=["does not fit"])
    with lens.watch(stack) as record:  # and the tap is free again
        stack(x)
    assert len(record) == 3


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return made


@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}], ids=["full", "causal"])
def test_statistics_of_a_long_input_never_hold_its_pairs(keywords, monkeypatch):
    monkeypatch.setattr(stripes, "_HERE", 2**16)
    model, n = Heads(heads=2, kv_heads=1), 3000
    x = torch.randn(1, n, 16)
    with Largest() as mode:
        record = watched(lambda: model(x, **keywords), model, keep="stats")
    assert mode.elements < n * n / 60, mode.elements
    # Seven numbers for each token and head, six of queries and one of keys.
    assert record.bytes == 6 * 2 * n * 4
