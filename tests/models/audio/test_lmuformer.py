"""LMUFormer: its sizes, its forms that are one, and the order of two tones."""

import sys
from pathlib import Path

import pytest
import torch

import attnlab
from attnlab.hub.official.lmuformer import ConvLMU
from attnlab.models.audio.lmuformer import SIZES, LMUFormer, TokenConv
from attnlab.nn.cache import numbers
from attnlab.nn.spiking.lif import LIF

KINDS = ("", "spikes", "membrane")
TINY = {"mels": 6, "dim": 8, "depth": 2, "window": 12, "num_classes": 3}


def lively(spiking, **options):
    """A small network in float64 whose neurons fire."""
    torch.manual_seed(0)
    net = LMUFormer(**{**TINY, **options}, spiking=spiking)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.bias, 0.9, 0.5)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    return net.double().eval()


@pytest.mark.parametrize("name", SIZES)
def test_has_the_parameters_of_the_authors_code(name):
    with torch.device("meta"):
        net = attnlab.build(name)
    assert sum(p.numel() for p in net.parameters()) == SIZES[name].params


@pytest.mark.parametrize("spiking", KINDS)
@pytest.mark.parametrize("pieces", [[1] * 23, [23], [2, 1, 9, 11]], ids=["1", "all", "some"])
def test_frames_as_they_come_give_what_all_frames_give(spiking, pieces):
    net, x = lively(spiking), torch.randn(2, 23, 6, dtype=torch.float64)
    state, out = net.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            logits, state = net(piece, state=state)
            out.append(logits)
        assert sum(o.shape[1] for o in out) == 23 - 5
        out = torch.cat([*out, net.finish(state)], 1)
        torch.testing.assert_close(out, net.prefixes(x))
        torch.testing.assert_close(out[:, -1], net(x))
    assert out.std() > 0
    _, state = net(x, state=net.initial_state(2))
    assert numbers(state) == 2 * net.card.state_numbers(net, 23)


def test_a_sound_of_one_frame_is_finished_too():
    net, x = lively(""), torch.randn(1, 1, 6, dtype=torch.float64)
    logits, state = net(x, state=net.initial_state(1))
    assert logits.shape == (1, 0, 3)
    torch.testing.assert_close(net.finish(state), net.prefixes(x))
    torch.testing.assert_close(net.finish(state), net.prefixes(x))  # finishing leaves the state as it was


@pytest.mark.parametrize("spiking", KINDS[1:])
def test_every_neuron_fires_0_or_1(spiking):
    net, said = lively(spiking), []
    for module in net.modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda m, i, o: said.append(o[0] if isinstance(o, tuple) else o))
    net(torch.randn(2, 20, 6, dtype=torch.float64))
    assert len(said) == sum(isinstance(m, LIF) for m in net.modules())
    assert all(set(s.unique().tolist()) <= {0.0, 1.0} for s in said)
    assert sum(s.mean() > 0.01 for s in said) > len(said) // 2


def test_looks_five_frames_ahead_and_no_further():
    net, x = lively(""), torch.randn(1, 16, 6, dtype=torch.float64, requires_grad=True)
    (by,) = torch.autograd.grad(net.prefixes(x)[0, 4].pow(2).sum(), x)
    assert by[0, 9].any() and not by[0, 10:].any()


def test_its_convolution_is_torchs():
    conv, x = TokenConv(4, 6), torch.randn(2, 9, 4)
    weight = conv.weight.unflatten(1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(conv(x), torch.conv1d(x.mT, weight, padding=1).mT)


@pytest.mark.parametrize("spiking", KINDS)
def test_a_checkpoint_in_the_authors_names_is_read(spiking):
    net = lively(spiking).float()
    theirs = {official(n, spiking): unrolled(n, t) for n, t in net.state_dict().items()}
    for buffer in ("A", "B", "H", "fft_H"):
        theirs[f"block.0.attn.lmu.{buffer}"] = torch.zeros(net.memory, 12)
    other, x = ConvLMU.build({}, theirs), torch.randn(2, 12, 6)
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)


def official(name, spiking):
    """The authors' name of one of our parameters."""
    where, _, rest = name.partition(".")
    if where == "embed":
        part, _, rest = rest.partition(".")
        index, _, leaf = rest.partition(".")
        if part.startswith("rpe"):
            return f"patch_embed.rpe_{'bn' if 'norm' in part else 'conv'}.{rest}"
        if spiking:
            return f"patch_embed.proj_{'conv' if part == 'convs' else 'bn'}{int(index) or ''}.{leaf}"
        return f"patch_embed.conv_layers.{index}.{0 if part == 'convs' else 3}.{leaf}"
    for ours, word in (
        ("blocks.", "block."), ("mixer.w", "attn.lmu.W_"), ("mixer.norm_", "attn.lmu.bn_"),
        ("proj.", "attn.proj_conv."), ("first_norm.", "attn.prev_bn."),
        ("mlp.fc1", "mlp.fc1_conv"), ("mlp.fc2", "mlp.fc2_conv"),
        ("mlp.norm1", "mlp.fc1_bn"), ("mlp.norm2", "mlp.fc2_bn"),
    ):  # fmt: skip
        name = name.replace(ours, word)
    if name.startswith("norm."):
        return name.replace("norm.", "head_bn.")
    return name.replace("0.norm.", "0.attn.proj_bn.").replace("1.norm.", "1.attn.proj_bn.")


def unrolled(name, tensor):
    """Products as the convolutions that the authors have."""
    if name.startswith(("embed.convs", "embed.rpe.")):
        return tensor.unflatten(1, (3, -1)).transpose(1, 2)
    return tensor.unsqueeze(-1) if tensor.ndim == 2 and ("mlp" in name or "proj" in name) else tensor


def test_with_memory_it_hears_which_tone_was_first():
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    from lmuformer import curve

    first, _, _, whole = curve("", memory=True, steps=60)
    assert first < 0.6 and 0.75 < whole  # one tone leaves two pairs
    assert curve("", memory=False, steps=60)[-1] < 0.6  # no order, so one of two


def test_refuses_what_does_not_fit():
    net = lively("")
    with pytest.raises(ValueError, match="x must be frames"):
        net(torch.randn(2, 9, 5))
    with pytest.raises(ValueError, match="x must be frames"):
        net(torch.randn(2, 0, 6))
    with pytest.raises(ValueError, match="spiking must be"):
        LMUFormer(spiking="yes")
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    with pytest.raises(TypeError, match="state must be what initial_state gives"):
        net(x, state=torch.zeros(2))
    for other in (net.initial_state(3), lively("spikes").initial_state(2)):
        with pytest.raises(ValueError, match="state belongs to another"):
            net(x, state=other)
    with pytest.raises(ValueError, match="must have seen a frame"):
        net.finish(net.initial_state(2))


def test_compiles_whole_and_says_the_same():
    net, x = lively("membrane", depth=1).float(), torch.randn(2, 3, 6)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(x), net(x))
