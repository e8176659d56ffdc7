"""Masked pre-training of spiking networks: what is hidden, what is asked, and that it is learned."""

import pytest
import torch

from attnlab.models.vision.spikformer import Spikformer
from attnlab.recipes.masked_spikes import MaskedSpikes, patches_of


def small(mode="sparse", dim=16, **options):
    """A small network whose neurons fire now and then."""
    torch.manual_seed(0)
    net = Spikformer(dim=dim, depth=1, heads=2, num_classes=3)
    for m in net.modules():
        if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(m.bias, 1.5, 1.0)
            torch.nn.init.constant_(m.weight, 2.0)
    return MaskedSpikes(net, mode=mode, image=64, dim=2 * dim, depth=1, heads=2, **options)


def test_patches_are_normed_pixels_in_row_major_order():
    x = torch.randn(2, 3, 32, 48)
    patches = patches_of(x)
    assert patches.shape == (2, 6, 768)
    own = x[1, :, 16:32, 32:48].permute(1, 2, 0).reshape(-1)
    torch.testing.assert_close(patches[1, 5], (own - own.mean()) / (own.var() + 1e-6).sqrt())


@pytest.mark.parametrize("mode", ["sparse", "pixel"])
def test_what_is_hidden_is_asked_for_and_never_shown(mode):
    module, x = small(mode).eval(), torch.randn(2, 3, 64, 64)
    hidden = module.hide(x, torch.Generator().manual_seed(0))
    assert hidden.sum(1).tolist() == [12, 12]
    pixels = hidden.view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    found = module(x, hidden=hidden)
    other = module(torch.where(pixels, torch.randn_like(x), x), hidden=hidden)
    assert torch.equal(found.patches, other.patches) and found.loss != other.loss
    error = (found.patches - patches_of(x)).pow(2).mean(-1)
    torch.testing.assert_close(found.loss, error[hidden].mean())
    seen = module(torch.where(pixels, x, torch.randn_like(x)), hidden=hidden)
    assert not torch.equal(found.patches, seen.patches)


def test_visible_tokens_alone_enter_the_blocks_and_return_to_their_places():
    module, x = small().eval(), torch.randn(2, 3, 64, 64)
    hidden, entered = module.hide(x, torch.Generator().manual_seed(1)), []
    module.network.blocks.register_forward_pre_hook(lambda m, inputs: entered.append(inputs[0]))
    said = module.encode(x, hidden)
    assert entered[0].shape == (1, 2, 4, 16)
    assert torch.equal(said[hidden], module.token.expand(24, -1))
    wanted = module.enter(module.network.blocks(entered[0]).mean(0))
    assert torch.equal(said[~hidden].view(2, 4, 32), wanted) and module.network.steps == 4


def test_learns_to_fill_in_what_it_does_not_see():
    """Every patch of an image is the same slope, up, down, to the left or to the right."""
    module = small(dim=32).train()
    generator = torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.Adam(module.parameters(), 5e-3), []
    ramp = torch.linspace(-1, 1, 16).repeat(4)
    slopes = torch.stack([sign * s for sign in (-1, 1) for s in (ramp.expand(64, 64), ramp.view(-1, 1).expand(64, 64))])
    for _ in range(40):
        x = slopes[torch.randint(4, (16,), generator=generator)].unsqueeze(1).expand(-1, 3, -1, -1)
        found = module(x, generator=generator)
        losses.append(found.loss.item())
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.7 * 5  # 1 is what the mean of all patches leaves
    assert all(p.grad is not None for n, p in module.named_parameters() if not n.startswith("network.head"))


def test_refuses_what_has_no_meaning():
    net = Spikformer(dim=16, depth=1, heads=2)
    for name, options in (
        ("ratio", {"ratio": 1.0}),
        ("mode", {"mode": "x"}),
        ("steps", {"steps": 0}),
        ("image", {"image": 60}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            MaskedSpikes(net, **options)
    module, x = small(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="images must be"):
        module(torch.randn(2, 3, 40, 32))
    with pytest.raises(ValueError, match="at least two patches"):
        module(torch.randn(2, 3, 16, 16))
    for hidden in (
        torch.zeros(2, 4, dtype=torch.bool),
        torch.ones(2, 4, dtype=torch.bool),
        torch.eye(4)[:2, :3].bool(),
    ):
        with pytest.raises(ValueError, match="hidden must be a mask"):
            module(x, hidden=hidden)
