"""Another pattern under unchanged weights: the full one changes nothing, others are the model under that mask."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import attnlab
from attnlab import lens
from attnlab.hub import register_transformers, swap
from attnlab.patterns import Axial, Full, Neighborhood, PowersOfTwo, Prefixed, Window
from attnlab.routing import TopKBlocks

GREEDY = dict(max_new_tokens=12, do_sample=False)
DECODER = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def all_of(grid: tuple[int, int]) -> Neighborhood:
    """Full attention by another road."""
    return Neighborhood(grid, grid)


def vit(timm, side: int = 64, depth: int = 3, **more) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=side, patch_size=8, embed_dim=48, depth=depth, num_heads=4, num_classes=10, **more
    ).eval()


@pytest.fixture
def llama(transformers):
    config = transformers.LlamaConfig(**DECODER)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 64, (3, 50))


@pytest.fixture
def padding(ids) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :20] = 0, 0
    return mask


@pytest.mark.parametrize("what", [Full(), all_of], ids=["Full", "whole neighborhood"])
@torch.no_grad()
def test_a_full_pattern_gives_the_untouched_model(timm, what) -> None:
    for side in (64, 256):  # small enough for torch's kernel, and large enough for tiles
        model, images = vit(timm, side, depth=1, reg_tokens=2), torch.randn(1, 3, side, side)
        wanted = model(images)
        with swap(model, what):
            torch.testing.assert_close(model(images), wanted)
        assert torch.equal(model(images), wanted)


@torch.no_grad()
def test_a_neighborhood_is_the_model_under_that_mask(timm) -> None:
    model, images = vit(timm, reg_tokens=2, dynamic_img_size=True), torch.randn(2, 3, 48, 80)
    pattern = Prefixed(Neighborhood((6, 10), 3), 3)
    wanted = model.forward_features(images, attn_mask=pattern.matrix(63))
    with swap(model, Neighborhood, kernel=3) as swapped:
        torch.testing.assert_close(model.forward_features(images), wanted)
        assert swapped.layers == tuple(f"blocks.{i}.attn" for i in range(3))
        other = torch.randn(1, 3, 64, 32)  # the grid of each call is its own
        mask = Prefixed(Neighborhood((8, 4), 3), 3).matrix(35)
        inside = model.forward_features(other)
    torch.testing.assert_close(inside, model.forward_features(other, attn_mask=mask))


@torch.no_grad()
def test_only_the_chosen_layers_change(timm) -> None:
    model, images = vit(timm), torch.randn(1, 3, 64, 64)
    outs: dict[str, list[torch.Tensor]] = {}
    for name, block in model.blocks.named_children():
        block.attn.register_forward_hook(lambda m, x, y, name=name: outs.setdefault(name, []).append(y))
    model(images)
    with swap(model, Neighborhood, kernel=3, layers=[-1]) as swapped:
        model(images)
    assert swapped.layers == ("blocks.2.attn",)
    assert [torch.equal(*outs[name]) for name in "012"] == [True, True, False]


@torch.no_grad()
def test_grids_of_transformers_and_torch(transformers) -> None:
    sizes = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=4)
    images = torch.randn(1, 3, 32, 32)
    for config in (
        transformers.ViTConfig(**sizes),
        transformers.CLIPVisionConfig(**sizes),
        transformers.SiglipVisionConfig(**sizes),
        transformers.Dinov2WithRegistersConfig(**sizes),
    ):
        model = transformers.AutoModel.from_config(config).eval()
        wanted = model(pixel_values=images).last_hidden_state
        with swap(model, all_of):
            torch.testing.assert_close(model(pixel_values=images).last_hidden_state, wanted)
        with swap(model, Neighborhood, kernel=3):
            assert not torch.allclose(model(pixel_values=images).last_hidden_state, wanted)


@torch.no_grad()
def test_grids_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=8,
        norm_num_groups=8, layers_per_block=1,
    ).eval()  # fmt: skip
    noisy = dict(sample=torch.randn(1, 4, 16, 12), timestep=3, encoder_hidden_states=torch.randn(1, 5, 16))
    wanted = unet(**noisy).sample
    with swap(unet, all_of) as swapped:
        torch.testing.assert_close(unet(**noisy).sample, wanted, atol=1e-5, rtol=1e-5)
    assert swapped.layers and all(name.endswith("attn1") for name in swapped.layers)  # cross attention stays
    with swap(unet, Neighborhood, kernel=3):
        assert not torch.allclose(unet(**noisy).sample, wanted, atol=1e-3)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=16, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=8,
    ).eval()  # fmt: skip
    latent = dict(hidden_states=torch.randn(1, 4, 16, 16), timestep=torch.tensor([3]), class_labels=torch.tensor([1]))
    wanted = dit(**latent).sample
    with swap(dit, all_of):
        torch.testing.assert_close(dit(**latent).sample, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_our_own_networks_take_patterns_too(ids) -> None:
    ours = attnlab.build("llama", vocabulary=64, dim=32, depth=2, heads=4, kv_heads=2, hidden=64).eval()
    wanted = ours(ids)
    with swap(ours, Full()):
        torch.testing.assert_close(ours(ids), wanted)
    with swap(ours, Window(1000)):
        torch.testing.assert_close(ours(ids), wanted)
    with swap(ours, Window(1, causal=False)):
        alone = torch.cat([ours(ids[:, i : i + 1]) for i in range(3)], 1)  # rotations of one token cancel
        torch.testing.assert_close(ours(ids)[:, :3], alone)


@torch.no_grad()
def test_a_window_is_the_sliding_window_of_transformers(transformers, llama, ids, padding) -> None:
    sliding = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**DECODER, sliding_window=8))
    sliding.eval().load_state_dict(llama.state_dict())
    wanted = sliding.generate(ids, attention_mask=padding, **GREEDY)
    with swap(llama, Window(8)):
        torch.testing.assert_close(llama(ids).logits, sliding(ids).logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(llama.generate(ids, attention_mask=padding, **GREEDY), wanted)


@pytest.mark.parametrize("what", [Full(), PowersOfTwo(block=4, window=1)], ids=str)
@torch.no_grad()
def test_generation_agrees_with_every_cache_and_padding(llama, ids, padding, what) -> None:
    plain = llama.generate(ids, attention_mask=padding, **GREEDY)
    with swap(llama, what):
        found = llama.generate(ids, attention_mask=padding, **GREEDY)
        assert torch.equal(llama.generate(ids, attention_mask=padding, use_cache=False, **GREEDY), found)
        static = llama.generate(ids, attention_mask=padding, cache_implementation="static", **GREEDY)
        alone = [llama.generate(i[m.bool()][None], **GREEDY)[0, -12:] for i, m in zip(ids, padding, strict=True)]
    assert torch.equal(static, found) and torch.equal(found[:, -12:], torch.stack(alone))
    assert torch.equal(found, plain) == isinstance(what, Full)
    assert torch.equal(llama.generate(ids, attention_mask=padding, **GREEDY), plain)


@torch.no_grad()
def test_positions_go_on_where_a_sliding_cache_drops_keys(transformers) -> None:
    config = transformers.MistralConfig(**DECODER, sliding_window=9)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 64, (1, 13))
    with swap(model, PowersOfTwo(block=2, window=1)):
        text = model.generate(ids, max_new_tokens=30, do_sample=False)
        wanted = model(text, use_cache=False).logits[:, 12:-1]
        for how in ({}, {"cache_implementation": "static"}):
            steps = model.generate(
                ids, max_new_tokens=30, do_sample=False, output_logits=True, return_dict_in_generate=True, **how
            )
            torch.testing.assert_close(torch.stack(steps.logits, 1), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_swap_is_the_same_under_our_own_attention_implementation(transformers, llama, ids, padding) -> None:
    register_transformers()
    ours = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(llama.config), attn_implementation="attnlab")
    ours.eval().load_state_dict(llama.state_dict())
    pattern = PowersOfTwo(block=4, window=1)
    for cache in ({}, {"cache_implementation": "static"}):
        with swap(llama, pattern), swap(ours, pattern):
            found = ours.generate(ids, attention_mask=padding, **GREEDY, **cache)
            assert torch.equal(found, llama.generate(ids, attention_mask=padding, **GREEDY, **cache))


@torch.no_grad()
def test_a_route_that_takes_everything_changes_nothing(timm) -> None:
    model, images = vit(timm), torch.randn(2, 3, 64, 64)
    wanted = model(images)
    with swap(model, TopKBlocks(100, block=8)):
        torch.testing.assert_close(model(images), wanted)
    with swap(model, TopKBlocks(1, block=8)):
        assert not torch.allclose(model(images), wanted)


def test_inference_mode_changes_nothing_under_a_full_pattern(llama, ids) -> None:
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with torch.inference_mode():
        before = llama(ids, attention_mask=padding).logits
        with swap(llama, Full()):
            after = llama(ids, attention_mask=padding).logits
    torch.testing.assert_close(after, before)


def test_training_goes_through_a_swap(timm) -> None:
    model, images = vit(timm, depth=1).train(), torch.randn(1, 3, 64, 64)
    mask = Prefixed(Neighborhood((8, 8), 3), 1).matrix(65)
    wanted = torch.autograd.grad(model.forward_features(images, attn_mask=mask).sum(), model.blocks[0].attn.qkv.weight)
    with swap(model, Neighborhood, kernel=3):
        found = torch.autograd.grad(model.forward_features(images).sum(), model.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_those_who_watch_see_the_swapped_pattern(timm) -> None:
    model, images = vit(timm), torch.randn(1, 3, 64, 64)
    seen = Prefixed(Neighborhood((8, 8), 3), 1).matrix(65)
    with lens.tap(model) as tap:
        watcher = _Weights()
        with swap(model, Neighborhood, kernel=3, layers=[0]):
            tap.subscribe(watcher)
            model(images)
        first, second = watcher.found[:2]
    assert torch.equal(first[0, 0] > 0, seen) and (second > 0).all()


class _Weights(lens.Subscriber):
    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def after(self, event, out) -> None:
        self.found.append(event.weights())


def test_explain_counts_what_is_saved_and_what_changes(timm) -> None:
    model, images = vit(timm, 256, depth=1), torch.randn(1, 3, 256, 256)
    full = swap(model, Full())
    same = full.explain(images)
    full.undo()
    assert (same.flops_before, same.saved, same.deviation) == (same.flops_after, 0.0, 0.0)
    with swap(model, Neighborhood, kernel=3) as local:
        found = local.explain(images)
    n, attended = 1025, 4 * 1025**2 * 48  # two products of N × N × 48 in all heads
    assert found.layers == ("blocks.0.attn",)
    assert 0.5 * attended < found.flops_before - found.flops_after < attended
    assert 0 < found.deviation < 1 and f"{found.saved:+.1%} saved" in str(found)
    assert n * n * 48 < found.flops_before


def test_explain_takes_keywords_and_structured_outputs(llama, ids, padding) -> None:
    with swap(llama, Window(2), layers="model.layers.1.*") as narrow:
        found = narrow.explain(input_ids=ids, attention_mask=padding)
        assert found.layers == ("model.layers.1.self_attn",) and found.deviation > 0.01
        assert found == narrow.explain(input_ids=ids, attention_mask=padding)


def test_bad_input_is_named_and_the_model_stays_as_it_was(timm, llama, ids) -> None:
    model, images = vit(timm), torch.randn(1, 3, 64, 64)
    wanted = model(images)
    pair = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)})
    pair.forward = lambda x: pair["attn"](x, x, x)[0]
    cases = [
        (model, images, dict(what=Neighborhood, kernel=3, layers=[7]), r"layers \[7\] .* 2 blocks.2.attn"),
        (model, images, dict(what=Neighborhood((4, 16), 3)), r"\(4, 16\), the layer's is \(8, 8\)"),
        (model, images, dict(what=Neighborhood, kernel=9), "kernel must fit the grid"),
        (model, images, dict(what=lambda grid: Axial(grid, 0), grid=(5, 5)), "65 tokens, but the grid is 5 × 5"),
        (pair, torch.randn(1, 9, 16), dict(what=Neighborhood, kernel=3), r"grid of attn is not known.*give grid="),
        (llama, ids, dict(what=Neighborhood, kernel=3), "give grid="),
        (nn.Linear(3, 3), torch.randn(1, 3), dict(what=Full()), "no attention call"),
    ]
    for victim, x, keywords, words in cases:
        with pytest.raises(ValueError, match=words), swap(victim, **keywords):
            victim(x)
    with swap(pair, Neighborhood, kernel=3, grid=(3, 3), prefix=1):
        pair(torch.randn(1, 10, 16))
    with swap(pair, Neighborhood, kernel=(1, 3, 3), grid=(2, 3, 3)):  # frames, rows, columns
        pair(torch.randn(1, 18, 16))
    for keywords, error, words in [
        (dict(what=3), TypeError, "what must be a pattern"),
        (dict(what=Window(3), size=4), ValueError, "options go with"),
        (dict(what="Window("), ValueError, "does not spell"),
        (dict(what=Full(), prefix=1), ValueError, "prefix=1 goes with a grid"),
    ]:
        with pytest.raises(error, match=words):
            swap(model, **keywords)
    with swap(model, Full()), pytest.raises(ValueError, match="open tap"), lens.tap(model):
        pass
    with swap(model, ~Full()), pytest.raises(ValueError, match=r"hides every key of the 65 that blocks.0.attn"):
        model(images)
    with swap(model, Window(9)), swap(model, Full(), layers=[1]):
        with pytest.raises(ValueError, match=r"blocks.1.attn has another pattern already"):
            model(images)
    assert torch.equal(model(images), wanted)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_was_undone_is_not_explained(timm) -> None:
    model, images = vit(timm, depth=1), torch.randn(1, 3, 64, 64)
    for what in (Full(), "gated"):
        swapped = swap(model, what)
        swapped.undo()
        with pytest.raises(ValueError, match="undone"):
            swapped.explain(images)


def test_undoing_twice_is_undoing_once(timm) -> None:
    model = vit(timm)
    swapped = swap(model, Full())
    swapped.undo()
    swapped.undo()
    with swap(model, Full()):
        pass
