"""CLIP equals the peer's, in either layout; prompts go where they should."""

import pytest
import torch

from attnlab.hub.official.clip import CLIP as Official
from attnlab.hub.renaming import load
from attnlab.models.skeletons.prompts import insert, run_prompted
from attnlab.models.vision.clip import CLIP, SIZES

TINY = dict(
    dim=32, depth=2, heads=2, image=16, patch=8, text_dim=24, text_depth=3, text_heads=2, words=50, length=9, out_dim=20
)


def test_equals_the_peer_on_the_same_weights(transformers) -> None:
    both = dict(hidden_act="quick_gelu", attention_dropout=0.0)
    vision = dict(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = dict(
        hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=9, eos_token_id=49, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config = transformers.CLIPConfig(vision_config={**vision, **both}, text_config={**text, **both}, projection_dim=20)
    peer = transformers.CLIPModel(config).eval()
    ours = CLIP(**TINY).eval()
    load(ours, Official.rename(peer.state_dict()))
    images, ids = torch.randn(2, 3, 16, 16), torch.randint(2, 48, (5, 9))
    ids[:, 6] = 49
    with torch.no_grad():
        wanted = peer(input_ids=ids, pixel_values=images).logits_per_image
        torch.testing.assert_close(ours(images, ids), wanted, rtol=1e-4, atol=1e-4)


def test_the_authors_layout_is_read() -> None:
    ours = CLIP(**TINY)
    theirs = {}
    for name, tensor in ours.state_dict().items():
        for a, b in (
            ("image.encoder.blocks.", "visual.transformer.resblocks."),
            ("text.encoder.blocks.", "transformer.resblocks."),
            ("image.encoder.norm", "visual.ln_post"),
            ("text.encoder.norm", "ln_final"),
            ("image.class_token", "visual.class_embedding"),
            ("image.positions.table", "visual.positional_embedding"),
            ("image.patches", "visual.conv1"),
            ("image.norm_pre", "visual.ln_pre"),
            ("image.head.weight", "visual.proj"),
            ("text.words", "token_embedding"),
            ("text.positions", "positional_embedding"),
            ("text.head.weight", "text_projection"),
            (".norm1", ".ln_1"),
            (".norm2", ".ln_2"),
            (".mixer.wqkv.", ".attn.in_proj_"),
            (".mixer.wo", ".attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            name = name.replace(a, b)
        theirs[name] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    load(ours, Official.rename({**theirs, "vocab_size": torch.tensor(50)}))


def test_has_the_published_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIP().parameters()) == SIZES["clip_vit_base_patch16"].params


def test_prompts_are_replaced_layer_by_layer_and_gone_at_the_end() -> None:
    seen = []

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.append(x[0, :, 0].tolist())
        return x + 10

    x, prompts = torch.zeros(1, 3, 1), [torch.ones(2, 1), None, 2 * torch.ones(1, 1)]
    out = run_prompted([block] * 4, x, prompts, at=1)
    assert seen == [[0, 1, 1, 0, 0], [10, 11, 11, 10, 10], [20, 2, 20, 20], [30, 12, 30, 30]]
    assert out[0, :, 0].tolist() == [40, 40, 40]
    with pytest.raises(ValueError, match="prompts"):
        insert(x, torch.ones(2, 3), 1)


def test_prompts_change_both_towers_in_every_layer() -> None:
    clip = CLIP(**TINY)
    images, ids = torch.randn(2, 3, 16, 16), torch.randint(2, 48, (5, 9))
    for tower, x, dim, depth in ((clip.image, images, 32, 2), (clip.text, ids, 24, 3)):
        prompts = [torch.randn(2, dim, requires_grad=True) for _ in range(depth)]
        out = tower(x, prompts)
        gradients = torch.autograd.grad(out.pow(2).sum(), prompts)
        assert out.shape == tower(x).shape and all(g.any() for g in gradients)
    with pytest.raises(ValueError, match="layer 0"):
        clip.text(ids, [None, torch.randn(2, 24)])
    with pytest.raises(ValueError, match="ids"):
        clip.text(torch.zeros(2, 12, dtype=torch.long))
