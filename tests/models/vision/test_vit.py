"""ViT and DeiT against timm's implementation with the same weights."""

import pytest
import torch

from attnlab.hub.official.vit import VisionTransformer


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_equals_timm_with_the_same_weights(timm, size: tuple[int, int]) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    theirs = timm.models.VisionTransformer(**arguments, init_values=0.1, dynamic_img_size=True).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = VisionTransformer.build({**arguments, "init_values": 0.1}, theirs.state_dict()).eval()
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(ours(x), theirs(x))
    maps = theirs.get_intermediate_layers(x, (0, 2), reshape=True, norm=True)
    torch.testing.assert_close(ours.forward_features(x, (0, 2)), list(maps))


def test_a_network_without_class_token_loads_too() -> None:
    from attnlab.models.vision.vit import ViT

    net = ViT(dim=16, depth=1, heads=2, image=16, patch=8, num_classes=3, class_token=False).eval()
    back = {
        "patches": "patch_embed.proj", "positions.table": "pos_embed", "encoder.": "", "mixer.wqkv": "attn.qkv",
        "mixer.wo": "attn.proj",
    }  # fmt: skip
    params = {}
    for name, tensor in net.state_dict().items():
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        params[name] = tensor[None] if name == "pos_embed" else tensor
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 3}
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(VisionTransformer.build(arguments, params).eval()(x), net(x))
