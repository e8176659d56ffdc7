"""Another mechanism in the place of attention: what of it was trained goes on, and undoing gives the old model back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import attnlab
from attnlab.hub import register_transformers, swap
from attnlab.hub.mechanism_swap import MechanismSwap
from attnlab.nn.softmax.gated import GatedAttention

GREEDY = dict(max_new_tokens=10, do_sample=False)
DECODER = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
# Those that begin where the old attention ended, and all others that the names promise.
SAME = [("multihead", {}), ("gated", {}), ("gated", {"gate": "element"}), ("moh", dict(shared=2, routed=2))]
OTHERS = [("sigmoid", {}), ("linear", {}), ("agent", dict(agents=9)), ("kda", dict(causal=True))]


@pytest.fixture
def vit(timm):
    return timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=10, dynamic_img_size=True
    ).eval()


@pytest.fixture(params=["Llama", "Qwen3"])
def llama(request, transformers):
    register_transformers()
    config = getattr(transformers, f"{request.param}Config")(**DECODER)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 64, (3, 40))


@pytest.mark.parametrize(("name", "options"), [*SAME, *OTHERS], ids=str)
def test_a_vision_transformer_takes_each_and_gets_its_own_back(vit, name, options) -> None:
    images = torch.randn(2, 3, 64, 64)
    wanted, before = vit(images), copy.deepcopy(vit.state_dict())
    with swap(vit, name, **options) as swapped:
        assert isinstance(swapped, MechanismSwap)
        found = vit(images)
        vit(torch.randn(1, 3, 48, 64))  # another size goes through as before
        found.sum().backward()
        # On one grid no table is resized, so every one gets a gradient.
        assert all(p.grad is not None for p in vit.parameters() if p.requires_grad)
        assert swapped.layers == ("blocks.0.attn", "blocks.1.attn")
        assert all(taken.taken[:2] == ("wqkv", "wo") for taken in swapped.report)
        with torch.no_grad():
            for p in vit.blocks[0].attn.parameters():
                p.add_(1.0)  # training the new layer leaves the old one alone
    if (name, options) in SAME:
        torch.testing.assert_close(found, wanted)
    else:
        assert not torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(vit(images), wanted)
    assert all(torch.equal(t, before[n]) for n, t in vit.state_dict().items())


@torch.no_grad()
def test_a_decoder_keeps_its_rotations_norms_and_groups(llama, ids) -> None:
    wanted = llama(ids).logits
    for name, options in SAME:
        with swap(llama, name, **options) as swapped:
            torch.testing.assert_close(llama(ids).logits, wanted, atol=1e-5, rtol=1e-5)
        assert "positions" in swapped.report[0].taken


@pytest.mark.parametrize(
    ("name", "options"),
    [("gated", {}), ("moh", dict(shared=2, routed=1)), ("sigmoid", dict(length=64)), ("linear", {}), ("kda", {})],
    ids=str,
)
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(llama, ids, name, options) -> None:
    padding = torch.ones_like(ids)
    padding[0, :7], padding[1, :20] = 0, 0
    with swap(llama, name, **options):
        found = llama.generate(ids, **GREEDY)
        assert torch.equal(llama.generate(ids, use_cache=False, **GREEDY), found)
        assert torch.equal(llama.generate(ids, cache_implementation="static", **GREEDY), found)
        if name in ("linear", "kda"):
            with pytest.raises(ValueError, match=r"attention_mask hides padding, and .* can leave nothing out"):
                llama.generate(ids, attention_mask=padding, **GREEDY)
            with pytest.raises(ValueError, match="past_key_values was reordered"):
                llama.generate(ids, num_beams=2, **GREEDY)
            with pytest.raises(ValueError, match="holds 40 tokens that this layer has not seen"):
                llama(ids, past_key_values=_foreign_cache(llama, ids, name, options))
            return
        padded = llama.generate(ids, attention_mask=padding, **GREEDY)[:, -10:]
        alone = [llama.generate(i[m.bool()][None], **GREEDY)[0, -10:] for i, m in zip(ids, padding, strict=True)]
        assert torch.equal(padded, torch.stack(alone))


def _foreign_cache(model, ids, name, options):
    fresh = copy.deepcopy(model)
    return fresh(ids, use_cache=True).past_key_values


@torch.no_grad()
def test_masks_of_our_own_attention_implementation_are_understood(transformers, ids) -> None:
    register_transformers()
    config = transformers.LlamaConfig(**DECODER)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="attnlab").eval()
    padding = torch.ones_like(ids)
    padding[0, :7] = 0
    wanted = model.generate(ids, attention_mask=padding, **GREEDY)
    with swap(model, "multihead"):
        assert torch.equal(model.generate(ids, attention_mask=padding, **GREEDY), wanted)


@torch.no_grad()
def test_transformers_vision_models_keep_their_signature(transformers) -> None:
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=4
    )
    model, images = transformers.AutoModel.from_config(config).eval(), torch.randn(2, 3, 32, 32)
    wanted = model(pixel_values=images).last_hidden_state
    with swap(model, "gated"):
        torch.testing.assert_close(model(pixel_values=images).last_hidden_state, wanted, atol=1e-5, rtol=1e-5)
    with swap(model, "agent", class_token=True, agents=9):
        assert model(pixel_values=images).last_hidden_state.shape == wanted.shape


@torch.no_grad()
def test_a_layer_is_read_as_what_it_does(transformers, ids) -> None:
    # Every fourth layer of this model leaves the rotations out.
    sizes = {**DECODER, "num_hidden_layers": 4}
    mixed = transformers.AutoModelForCausalLM.from_config(transformers.Cohere2Config(**sizes, sliding_window=64)).eval()
    wanted = mixed(ids).logits
    with swap(mixed, "multihead") as swapped:
        torch.testing.assert_close(mixed(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert ["positions" in taken.taken for taken in swapped.report] == [True, True, True, False]


@torch.no_grad()
def test_what_is_added_to_scores_is_not_lost_silently(transformers, vit) -> None:
    config = transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        use_relative_position_bias=True,
    )  # fmt: skip
    beit = transformers.AutoModel.from_config(config).eval()
    for name, p in beit.named_parameters():
        if "relative_position_bias" in name:
            p.normal_()
    with swap(beit, "gated"), pytest.raises(ValueError, match=r"adds other numbers|called with .*bias"):
        beit(pixel_values=torch.randn(1, 3, 32, 32))
    with swap(vit, "gated"), pytest.raises(ValueError, match="adds other numbers to the scores"):
        vit.forward_features(torch.randn(1, 3, 64, 64), attn_mask=torch.randn(65, 65))


def test_a_layer_that_does_more_than_its_weights_say_is_refused() -> None:
    class Capped(nn.MultiheadAttention):
        def forward(self, *arguments, **keywords):
            y, weights = super().forward(*arguments, **keywords)
            return y.tanh(), weights

    model = nn.Sequential(Capped(16, 2))
    model[0].out_proj.train()
    modes = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match="a Capped does more than softmax attention"):
        swap(model, "gated")
    assert modes == [m.training for m in model.modules()] and type(model[0]) is Capped


@torch.no_grad()
def test_torch_layers_keep_their_masks_and_leave_their_shortcut() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 9, 32), torch.zeros(3, 9, dtype=torch.bool)
    padding[0, 6:] = True
    plain, masked = encoder(x), encoder(x, src_key_padding_mask=padding)
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    later = encoder(x, mask=causal, is_causal=True)
    for name in ("multihead", "gated"):
        with swap(encoder, name):
            torch.testing.assert_close(encoder(x), plain)
            real = ~padding
            torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[real], masked[real])
            with pytest.raises(ValueError, match="is_causal=True: swap with causal=True"):
                encoder(x, mask=causal, is_causal=True)
        with swap(encoder, name, causal=True):
            torch.testing.assert_close(encoder(x, mask=causal, is_causal=True), later)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0), 1).eval()  # length leads
    memory = torch.randn(7, 9, 32)
    wanted = decoder(x, memory)
    with swap(decoder, "gated") as swapped:
        torch.testing.assert_close(decoder(x, memory), wanted)
        assert swapped.layers == ("layers.0.self_attn", "layers.0.multihead_attn")


def test_our_own_layers_are_replaced_too(ids) -> None:
    ours = attnlab.build("llama", vocabulary=64, dim=32, depth=2, heads=4, kv_heads=2, hidden=64).eval()
    wanted = ours(ids)
    with swap(ours, GatedAttention, layers=["blocks.0.*"]) as swapped:
        torch.testing.assert_close(ours(ids), wanted)
        assert [type(b.mixer) is GatedAttention for b in ours.blocks] == [True, False]
    assert swapped.layers == ("blocks.0.mixer",)


def test_what_was_taken_is_said(vit, llama) -> None:
    with swap(vit, "kda", causal=True, layers=[0]) as swapped:
        (taken,) = swapped.report
        assert taken.dropped == ("the bias of wqkv", "the bias of wo") and "a_log" in taken.new
        assert str(swapped).startswith("blocks.0.attn: takes wqkv, wo; new: a_log")
    with swap(llama, "kda") as swapped:
        assert "positions" in swapped.report[0].dropped  # grouped keys were given to every head
        assert swapped.report[0].taken == ("wqkv", "wo")


def test_explain_on_a_mechanism(vit) -> None:
    images = torch.randn(1, 3, 128, 128)
    with swap(vit, "linear") as swapped:
        found = swapped.explain(images)
        assert found.saved > 0 and 0 < found.deviation < 1
        assert "mixer" in dict(vit.blocks[0].attn.named_children())  # it is still there


def test_a_swapped_model_can_be_saved_whole(llama, ids) -> None:
    with swap(llama, "kda"), torch.no_grad():
        llama.generate(ids, **GREEDY)
        again = pickle.loads(pickle.dumps(llama.model.layers[0].self_attn))
        assert again.state_dict().keys() == llama.model.layers[0].self_attn.state_dict().keys()


def test_bad_input_is_named_and_the_model_stays_as_it_was(vit, timm) -> None:
    images, wanted = torch.randn(1, 3, 64, 64), None
    wanted = vit(images)
    for keywords, error, words in [
        (dict(what="kda"), ValueError, "causal must be True"),
        (dict(what="gaeted"), ValueError, "did you mean 'gated'"),
        (dict(what="focal"), ValueError, "'focal' is of kind 'features'"),
        (dict(what="gated", layers=["blocks.9.*"]), ValueError, "0 blocks.0.attn, 1 blocks.1.attn"),
        (dict(what="gated", layers=5), ValueError, "5 is not there"),
        (dict(what="gated", layers=lambda event: True), TypeError, "layers must be ordinals or names"),
        (dict(what="gated", gate="door"), ValueError, "gate must be one of"),
    ]:
        with pytest.raises(error, match=words):
            swap(vit, **keywords)
    with swap(vit, "neighborhood", kernel=3), pytest.raises(ValueError, match="a grid behind 0 tokens, but 1 stand"):
        vit(images)
    with pytest.raises(ValueError, match="no attention module that can be replaced"):
        swap(nn.Linear(3, 3), "gated")
    gated = timm.layers.Attention(32, 4, gated=True)
    with pytest.raises(ValueError, match="cannot be replaced: it has a gate of its own"):
        swap(nn.Sequential(gated), "gated")
    assert torch.equal(vit(images), wanted)
