"""Spikformer: sizes, spikes everywhere, steps, and what its stem hides."""

import pytest
import torch

import attnlab
from attnlab.hub.official.spikformer import Spikformer as Official
from attnlab.models.vision.spikformer import POOLED, SIZES, Spikformer, SpikingConv, SpikingStem
from attnlab.nn.spiking.lif import LIF

TINY = {"dim": 16, "depth": 2, "heads": 2, "num_classes": 5}


def lively(**options):
    """A small network whose neurons fire."""
    torch.manual_seed(0)
    net = Spikformer(**{**TINY, **options})
    for module in net.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(module.bias, 0.9, 0.5)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    return net.eval()


# With layer norms that nothing calls, as the authors' first version has: in millions, the paper's, and that version's.
@pytest.mark.parametrize(
    ("name", "counted"),
    [("spikformer_v2_8_384", 29.11), ("spikformer_v2_8_512", 51.54), ("spikformer_v2_16_768", 172.27)],
)
def test_has_the_papers_parameters(name, counted):
    arguments = SIZES[name].arguments
    idle = 4 * arguments["dim"] * arguments["depth"]
    assert (SIZES[name].params + idle) / 1e6 == pytest.approx(counted, abs=0.005)


def test_the_first_version_has_the_parameters_of_its_code():
    assert SIZES["spikformer_8_512"].params + 4 * 512 * 8 == 29_705_768


@pytest.mark.parametrize("stem", [{}, POOLED], ids=["second", "first"])
def test_every_neuron_fires_0_or_1_and_sums_are_whole(stem):
    net, said = lively(stem=stem), []
    for module in net.modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda m, i, o: said.append(o))
    tokens = net.blocks(net.embed(torch.randn(2, 3, 48, 33))[0])
    assert tokens.shape == (4, 2, 9, 16) and torch.equal(tokens, tokens.round()) and tokens.max() > 1
    assert all(set(s.unique().tolist()) <= {0.0, 1.0} for s in said)
    assert len(said) == sum(isinstance(m, LIF) for m in net.modules())


def test_an_image_is_the_same_frame_at_every_step_in_training_too():
    net, x = lively(steps=3), torch.randn(2, 3, 32, 32)
    frames = x.expand(3, *x.shape)
    torch.testing.assert_close(net(x), net(frames))
    shown, film = SpikingConv(3, 8), SpikingConv(3, 8)
    film.load_state_dict(shown.state_dict())
    assert torch.equal(shown(x.unsqueeze(0), 3), film(frames))
    torch.testing.assert_close(shown.norm.running_var, film.norm.running_var)


def test_steps_add_to_each_other_and_calls_do_not():
    net, x = lively(), torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), net(x))
    four = net(x)
    net.steps = 1
    assert not torch.equal(net(x), four)


def test_what_is_hidden_reaches_no_visible_place():
    torch.manual_seed(0)
    stem, x = SpikingStem(3, 16).eval(), torch.randn(1, 1, 3, 64, 64)
    for m in stem.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(m.bias, 1.5, 1.0)
            torch.nn.init.constant_(m.weight, 2.0)
    visible = torch.rand(1, 1, 4, 4) < 0.5
    pixels = visible.repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = torch.where(pixels, x, torch.randn_like(x))
    y = stem(x, 0, visible)
    assert torch.equal(stem(other, 0, visible), y) and y.any()
    assert not y[..., ~visible[0, 0]].any() and not torch.equal(stem(other), stem(x))


def test_a_checkpoint_in_the_authors_names_is_read():
    net = lively(stem=POOLED)
    theirs = {}
    for name, t in net.state_dict().items():
        if ".mixer.wqkv" in name or ".mixer.norm." in name:
            base = name.replace("blocks", "block").replace(".mixer.", ".attn.")
            for part, letter in zip(t.chunk(3) if t.ndim else (t, t, t), "qkv", strict=True):
                word = base.replace("wqkv", f"{letter}_conv").replace("attn.norm", f"attn.{letter}_bn")
                theirs[word] = part.unsqueeze(-1) if part.ndim == 2 else part
            continue
        ours = name
        for a, b in (
            ("blocks", "block"), ("mixer.wo", "attn.proj_conv"), ("mixer.norm_o", "attn.proj_bn"),
            ("fc1", "fc1_conv"), ("fc2", "fc2_conv"), ("norm1", "fc1_bn"), ("norm2", "fc2_bn"),
            ("stem.rpe.conv", "patch_embed.rpe_conv"), ("stem.rpe.norm", "patch_embed.rpe_bn"),
        ):  # fmt: skip
            name = name.replace(a, b)
        if name.startswith("stem.stages."):
            _, _, stage, _, kind, leaf = name.split(".")
            number = "" if stage == "0" else stage
            name = f"patch_embed.proj_{'conv' if kind == 'conv' else 'bn'}{number}.{leaf}"
        theirs[name] = t.view(*t.shape, 1, 1) if t.ndim == 2 and "mlp" in ours else t
    theirs["block.0.norm1.weight"] = torch.ones(16)
    other, x = Official.build({"num_heads": 2}, theirs), torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x), net(x)) and net(x).std() > 0


def test_gives_features_by_name():
    net = attnlab.build("spikformer_v2", **TINY, features_only=True).eval()
    (maps,) = net(torch.randn(1, 3, 40, 64))
    assert maps.shape == (1, 16, 3, 4)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="steps must be"):
        Spikformer(**TINY, steps=0)
    with pytest.raises(ValueError, match="dim must be a multiple of 8"):
        SpikingStem(3, 12)
    with pytest.raises(ValueError, match="units and plain need one entry per step"):
        SpikingStem(3, 16, units=(1,))
    for shape in ((2, 1, 32, 32), (3, 32, 32), (0, 3, 32, 32)):
        with pytest.raises(ValueError, match="x must be images"):
            lively()(torch.randn(shape))
