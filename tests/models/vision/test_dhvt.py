"""DHVT: its attention and feed-forward layer by hand, any image size, exact folding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlab
from attnlab.hub.official.dhvt import Network
from attnlab.models.vision.dhvt import DHVT, ConvFeedForward, PatchStem
from attnlab.nn.softmax.head_tokens import HeadTokens

TINY = {"dim": 16, "depth": 2, "heads": 2, "patch": 4, "num_classes": 5}


def moved(module: nn.Module) -> nn.Module:
    """In float64, with every parameter and statistic off its special value."""
    for p in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
        p.data.add_(0.3 * torch.rand_like(p))
    return module.double().eval()


def by_hand(m: HeadTokens, x: Tensor) -> Tensor:
    h, d, out = m.heads, m.head_dim, []
    for tokens in x:
        speak = []
        for i in range(h):
            raw = m.head_in(tokens[:, i * d : (i + 1) * d].mean(0)).split(d)
            speak.append(torch.cat([F.gelu(m.head_norm(r)) for r in raw]) + m.head_embedding[i])
        everyone = torch.cat((tokens, torch.stack(speak)))
        q, k, v = m.wqkv(everyone).chunk(3, -1)
        heads = []
        for i in range(h):
            part = slice(i * d, (i + 1) * d)
            heads.append((q[:, part] @ k[:, part].T / d**0.5).softmax(-1) @ v[:, part])
        y = m.wo(torch.cat(heads, -1))
        out.append(torch.cat((y[:1] + y[-h:].mean(0), y[1:-h])))
    return torch.stack(out)


@torch.no_grad()
def test_head_tokens_equal_their_definition_and_know_no_places() -> None:
    m, x = moved(HeadTokens(12, heads=3)), torch.randn(2, 8, 12, dtype=torch.float64)
    y = m(x)
    torch.testing.assert_close(y, by_hand(m, x))
    order = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(7)))
    torch.testing.assert_close(m(x[:, order]), y[:, order])


@torch.no_grad()
def test_the_class_token_passes_a_feed_forward_layer_whose_weight_is_one_as_it_is() -> None:
    m, x = moved(ConvFeedForward(8, 12)), torch.randn(2, 7, 8, dtype=torch.float64)
    assert not torch.allclose(m(x, grid=(2, 3))[:, 0], x[:, 0])
    nn.init.zeros_(m.excite.weight)
    nn.init.ones_(m.excite.bias)
    assert torch.equal(m(x, grid=(2, 3))[:, 0], x[:, 0])


@torch.no_grad()
def test_folded_batch_norms_change_nothing() -> None:
    net, x = moved(DHVT(**TINY)), torch.randn(2, 3, 20, 28, dtype=torch.float64)
    wanted = net(x)
    torch.testing.assert_close(net.fuse()(x), wanted)
    assert net.fuse() is net and not any(isinstance(m, nn.BatchNorm2d) for m in net.blocks.modules())


def test_stems_widen_to_the_dim_and_only_one_convolution_has_an_activation_behind_it() -> None:
    assert [c.conv.out_channels for c in list(PatchStem(3, 32, 16))[1:-1]] == [4, 8, 16, 32]
    for patch, activations in ((16, [True, True, True, False]), (4, [True, False]), (2, [True])):
        assert [hasattr(c, "act") for c in list(PatchStem(3, 32, patch))[1:-1]] == activations


@pytest.mark.parametrize("size", [(32, 32), (21, 34)])
def test_takes_any_image_size(size: tuple[int, int]) -> None:
    net, x = DHVT(**TINY).eval(), torch.randn(1, 3, *size)
    assert net(x).shape == (1, 5)
    assert net.forward_features(x)[0].shape == (1, 16, -(-size[0] // 4), -(-size[1] // 4))


@pytest.mark.parametrize("name", ["dhvt_small_imagenet_patch16", "dhvt_tiny_cifar_patch2"])
def test_the_authors_checkpoints_load_by_their_names(name: str) -> None:
    with torch.device("meta"):
        ours = attnlab.build(name).state_dict()
    last = max(int(n.split(".")[1]) for n in ours if n.startswith("stem."))
    back = {"wqkv": "qkv", "wo": "proj", "head_in": "ht_proj", "head_norm": "ht_norm", "head_embedding": "pos_embed"}
    feed = {"fc1": "conv1", "conv": "conv2", "fc2": "conv3", "squeeze": "compress", "excite": "excitation"}
    feed |= {f"norm{i}": f"bn{i}" for i in (1, 2, 3)}
    theirs: dict[str, Tensor] = {}
    for name, p in ours.items():  # the authors' layout, written out backwards
        parts = name.split(".")
        if parts[0] == "stem" and parts[1] in ("0", str(last)):
            end = {"weight": "alpha", "bias": "beta"}[parts[2]]
            parts = ["patch_embed", "pre_affine" if parts[1] == "0" else "post_affine", end]
            p = p[None, :, None, None]
        elif parts[0] == "stem":
            parts[:3] = ["patch_embed", "proj", str(2 * int(parts[1]) - 2), {"conv": "0", "norm": "1"}[parts[2]]]
        elif parts[0] == "class_token":
            parts, p = ["cls_token"], p[None, None]
        elif len(parts) > 2 and parts[2] == "mixer":
            parts = [{"mixer": "attn", **back}.get(part, part) for part in parts]
            p = p[None] if parts[-1] == "pos_embed" else p
        elif len(parts) > 2 and parts[2] == "mlp":
            parts[3] = feed[parts[3]]
            p = p[:, :, None, None] if parts[3:] in (["conv1", "weight"], ["conv3", "weight"]) else p
        theirs[".".join(parts)] = p
    assert {n: p.shape for n, p in Network.rename(theirs).items()} == {n: p.shape for n, p in ours.items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatchStem(3, 16, 6), "patch must be a power of 2"),
        (lambda: PatchStem(3, 12, 16), "dim must be a multiple of 8 with patch=16, got 12"),
        (lambda: HeadTokens(8, heads=2, causal=True), "has no causal form"),
        (lambda: DHVT(**TINY)(torch.randn(1, 1, 8, 8)), r"x must be images \(B, 3, H, W\)"),
        (lambda: DHVT(**TINY).fuse(), r"fuse\(\) needs eval\(\)"),
    ],
)
def test_errors_name_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
