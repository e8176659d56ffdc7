"""NiNformer: its parameters, one norm for two, timm's mixer block as a peer, what the gate keeps."""

import pytest
import torch
from torch import nn

from attnlab.hub.official.ninformer import NiNformerImageClassification, TimmMixerBlock
from attnlab.models.vision.ninformer import GateBlock, NiNformer
from attnlab.nn.tokens.mixer_gate import MixerBlock, MixerGate

TINY = {"image": 16, "dim": 12, "hidden": 20, "depth": 2}


@pytest.mark.parametrize(("dim", "tokens", "hidden"), [(12, 9, 20), (256, 64, 512)])
def test_a_blocks_parameters_are_those_of_the_paper(dim, tokens, hidden):
    with torch.device("meta"):
        block = GateBlock(dim, tokens=tokens, hidden=hidden)
    mlp = lambda width: 2 * width * hidden + hidden + width  # noqa: E731
    wanted = 2 * dim + (4 * dim + mlp(tokens) + mlp(dim) + dim * dim + dim) + mlp(dim)
    assert sum(p.numel() for p in block.parameters()) == wanted
    assert dim != 256 or round(4 * wanted / 1e6, 3) == 2.637  # the authors' four blocks


def test_equals_timms_mixer_block(timm):
    from timm.models.mlp_mixer import MixerBlock as Peer

    peer = Peer(12, 9, mlp_ratio=(20 / 12, 20 / 12), norm_layer=nn.LayerNorm).eval()
    for p in peer.parameters():
        nn.init.normal_(p, std=0.4)
    block = TimmMixerBlock.build({"dim": 12, "seq_len": 9}, peer.state_dict())
    x = torch.randn(2, 9, 12, requires_grad=True)
    torch.testing.assert_close(block(x), peer(x), rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(m(x).pow(2).sum(), x)[0] for m in (block, peer))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_gate_keeps_the_mixers_residual_path():
    gate, x = MixerGate(8, tokens=5), torch.randn(2, 5, 8)
    for mlp in (gate.mixer.token_mlp, gate.mixer.channel_mlp):
        nn.init.zeros_(mlp.fc2.weight)
        nn.init.zeros_(mlp.fc2.bias)
    torch.testing.assert_close(gate(x), gate.proj(x) * x)


def test_one_norm_serves_both_paths_of_a_block():
    block, x = GateBlock(8, tokens=5, hidden=6), torch.randn(2, 5, 8)
    nn.init.normal_(block.norm.weight)
    assert sum(isinstance(m, nn.LayerNorm) for m in block.modules()) == 3  # this one, and the inner mixer's two
    normed = torch.nn.functional.layer_norm(x, (8,), block.norm.weight, block.norm.bias)
    y = x + block.mixer.proj(normed) * block.mixer.mixer(normed)
    again = torch.nn.functional.layer_norm(y, (8,), block.norm.weight, block.norm.bias)
    torch.testing.assert_close(block(x), y + block.mlp(again))


def test_the_order_of_tokens_matters():
    gate, x = MixerGate(8, tokens=6), torch.randn(1, 6, 8)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    assert not torch.allclose(gate(x[:, order]), gate(x)[:, order], atol=1e-3)


def test_nothing_is_dropped_in_evaluation():
    net, x = NiNformer(**TINY, dropout=0.5), torch.randn(1, 3, 16, 16)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_the_authors_checkpoints_load_by_their_names():
    net = NiNformer(**TINY)
    theirs = {}
    for name, p in net.state_dict().items():  # the authors' layout, written out backwards
        name = name.replace("patches.", "patcher.").replace("head.", "classifier.").replace("blocks.", "model.")
        name = name.replace("mixer.proj", "mgu.proj").replace(".mixer.mixer.", ".mgu.Mixer.").replace(".mlp.", ".ffn.")
        for ours, official in (("norm1", "token_mix.0"), ("token_mlp", "token_mix.2"), ("norm2", "channel_mix.0")):
            name = name.replace(ours, official)
        name = name.replace("channel_mlp", "channel_mix.1").replace("fc1", "net.0").replace("fc2", "net.3")
        theirs[name] = p
    sizes = {"image_size": 16, "d_model": 12, "d_ffn": 20, "num_layers": 2}
    loaded, x = NiNformerImageClassification.build(sizes, theirs), torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(x), net.eval()(x))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="x must have the 5 tokens that the gate was built for, got 6"):
        MixerGate(8, tokens=5)(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match="causal must be False: the token MLP sees all tokens"):
        MixerGate(8, tokens=5, causal=True)
    with pytest.raises(ValueError, match="image must be a multiple of patch=4"):
        NiNformer(image=30)
    with pytest.raises(ValueError, match=r"x must be images \(B, 3, 16, 16\)"):
        NiNformer(**TINY)(torch.randn(1, 3, 20, 16))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        MixerGate(8, tokens=0)
    assert MixerBlock(4, 3, 2)(torch.randn(1, 3, 4)).shape == (1, 3, 4)
