"""The plain skeleton: any mixer, any size, class token or mean, and clear errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.models.skeletons.plain import Encoder, Plain, Positions, TokenBlock
from attnlab.nn.multihead import MultiHead


def small(**keywords) -> Plain:
    defaults = {"dim": 16, "depth": 2, "image": 32, "patch": 8, "num_classes": 5, "mixer_options": {"heads": 2}}
    return Plain(**{**defaults, "mixer": "multihead", **keywords}).eval()


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (8, 8)])
def test_any_multiple_of_the_patch_gives_logits_and_maps(size: tuple[int, int], class_token: bool) -> None:
    net, x = small(class_token=class_token), torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    first, last = net.forward_features(x, (0, -1))
    assert first.shape == last.shape == (2, 16, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize(
    ("mixer", "options"), [("outlook", {"heads": 2}), ("agent", {"heads": 2, "agents": 4}), ("multihead", {"heads": 4})]
)
def test_any_registered_mechanism_mixes_by_its_name(mixer: str, options: dict) -> None:
    net = small(mixer=mixer, mixer_options=options, class_token=False)
    x = torch.randn(1, 3, 32, 32)
    assert net(x).shape == (1, 5)
    assert net.forward_features(x)[0].shape == (1, 16, 4, 4)


def test_a_function_of_the_layer_builds_a_mixer_for_each() -> None:
    net = small(mixer=lambda layer: MultiHead(16, heads=2 ** (layer + 1)), mixer_options=None)
    assert [block.mixer.heads for block in net.encoder.blocks] == [2, 4]


def test_the_last_map_is_what_the_head_reads() -> None:
    net, x = small(class_token=False), torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(net.head(net.forward_features(x)[0].mean((2, 3))), net(x))


def test_tokens_stay_contiguous_so_that_no_layer_copies_them() -> None:
    tokens, _ = small(class_token=False).embed(torch.randn(2, 3, 32, 32))
    assert tokens.is_contiguous()


@pytest.mark.parametrize("prefix", [0, 1])
def test_positions_are_exact_at_their_size_and_smooth_at_others(prefix: int) -> None:
    positions = Positions((4, 6), 3, prefix=prefix)
    assert positions.resized((4, 6)) is positions.table
    resized = positions.resized((8, 3))
    maps = positions.table[prefix:].reshape(1, 4, 6, 3).permute(0, 3, 1, 2)
    wanted = F.interpolate(maps, size=(8, 3), mode="bicubic", antialias=True)[0].flatten(1).t()
    torch.testing.assert_close(resized[prefix:], wanted)
    assert torch.equal(resized[:prefix], positions.table[:prefix])


def test_an_encoder_with_positions_takes_sequences_of_any_length() -> None:
    positions, encoder = Positions((10,), 8), Encoder(dim=8, depth=2, mixer="multihead", mixer_options={"heads": 2})
    for length in (10, 3, 25):
        x = torch.zeros(2, length, 8)
        assert encoder(positions(x, grid=(length,))).shape == x.shape


def test_layer_scale_and_drop_path_act_on_the_branches_alone() -> None:
    x = torch.randn(4, 6, 8)
    block = TokenBlock(8, MultiHead(8, heads=2), layer_scale=0.0)
    torch.testing.assert_close(block(x), x)
    net = small(drop_path=0.5)
    assert [block.drop_path.rate for block in net.encoder.blocks] == [0.0, 0.5]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="image"):
        small(image=30)
    with pytest.raises(ValueError, match="patch"):
        small()(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match="layers"):
        small().forward_features(torch.randn(1, 3, 32, 32), (2,))
    with pytest.raises(ValueError, match="mixer_options"):
        small(mixer=lambda layer: nn.Identity())
    with pytest.raises(ValueError, match="grid"):
        Positions((2, 2, 2), 4)
    with pytest.raises(ValueError, match="did you mean"):
        small(mixer="outlok")
    with pytest.raises(ValueError, match="grid"):
        small(mixer="outlook", class_token=True)(torch.randn(1, 3, 32, 32))
