"""Attentive convolution: the equations written out, its kernels, inhibition, and what a static kernel cannot do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.spatial.attentive_conv import AttentiveConv, AttentiveConvTokens, strips


def shaken(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


@pytest.mark.parametrize(("size", "kernel"), [((5, 7), 3), ((6, 6), 3), ((1, 2), 3), ((9, 8), 5)])
def test_equals_the_equations_written_out(size, kernel):
    conv = shaken(AttentiveConv(4, kernel=kernel))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    tokens = x.flatten(2)
    pooled = F.adaptive_avg_pool1d((conv.wk.weight @ tokens) + conv.wk.bias[:, None], kernel**2)
    made = F.gelu(pooled) @ conv.wg.weight.T + conv.wg.bias
    made = made - conv.inhibition.sigmoid()[:, None] * made.mean(-1, keepdim=True)
    v = ((conv.wv.weight @ tokens) + conv.wv.bias[:, None]).unflatten(2, size)
    columns = F.unfold(v, kernel, padding=kernel // 2).unflatten(1, (4, kernel**2))
    y = (columns * made[..., None]).sum(2)
    torch.testing.assert_close(conv(x), ((conv.wo.weight @ y) + conv.wo.bias[:, None]).unflatten(2, size))


@pytest.mark.parametrize("places", [1, 4, 9, 10, 35, 49])
def test_strips_are_those_of_adaptive_pooling(places):
    x = torch.randn(1, 3, places, dtype=torch.float64)
    torch.testing.assert_close(x @ strips(places, 9, x).T, F.adaptive_avg_pool1d(x, 9))


def test_pooling_is_over_the_raster_and_not_over_cells():
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 1] = 1.0  # the second row is the second strip
    wanted = torch.zeros(9, dtype=torch.float64)
    wanted[1] = 1.0
    torch.testing.assert_close(strips(81, 9, x) @ x.flatten(), wanted)


def test_layouts_in_memory_give_the_same():
    conv, x = AttentiveConv(8), torch.randn(3, 8, 5, 6)
    torch.testing.assert_close(conv(x), conv(x.contiguous(memory_format=torch.channels_last)))


def test_fully_inhibited_kernels_sum_to_zero_and_free_ones_are_as_made():
    conv, tokens = shaken(AttentiveConv(4)), torch.randn(2, 30, 4, dtype=torch.float64)
    nn.init.constant_(conv.inhibition, 60.0)
    full = conv.kernels(tokens)
    torch.testing.assert_close(full.sum(-1), torch.zeros(2, 4, dtype=torch.float64))
    nn.init.constant_(conv.inhibition, -60.0)
    free = conv.kernels(tokens)
    torch.testing.assert_close(full, free - free.mean(-1, keepdim=True))
    nn.init.zeros_(conv.inhibition)
    torch.testing.assert_close(conv.kernels(tokens), free - 0.5 * free.mean(-1, keepdim=True))


def test_fully_inhibited_a_constant_map_gives_nothing_inside():
    conv = shaken(AttentiveConv(4))
    nn.init.constant_(conv.inhibition, 60.0)
    nn.init.zeros_(conv.wo.bias)
    y = conv(torch.full((1, 4, 7, 8), 0.3, dtype=torch.float64))
    torch.testing.assert_close(y[..., 1:-1, 1:-1], torch.zeros(1, 4, 5, 6, dtype=torch.float64))
    assert y[..., 0, :].abs().max() > 1e-3


def test_without_a_generator_it_is_a_static_depthwise_convolution():
    conv, x = shaken(AttentiveConv(4)), torch.randn(2, 4, 6, 7, dtype=torch.float64)
    nn.init.zeros_(conv.wg.weight)
    kernel = conv.wg.bias - conv.inhibition.sigmoid()[:, None] * conv.wg.bias.mean()
    v = torch.einsum("dc,bchw->bdhw", conv.wv.weight, x) + conv.wv.bias[:, None, None]
    y = F.conv2d(v, kernel.reshape(4, 1, 3, 3), padding=1, groups=4)
    torch.testing.assert_close(conv(x), torch.einsum("dc,bchw->bdhw", conv.wo.weight, y) + conv.wo.bias[:, None, None])


def test_the_token_form_is_the_map_form_with_a_tanh_gelu():
    tokens, conv = AttentiveConvTokens(4), AttentiveConv(4, approximate="tanh")
    conv.load_state_dict(tokens.conv.state_dict())
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(tokens(x.flatten(2).mT, grid=(5, 6)), conv(x).flatten(2).mT)


def test_it_shifts_a_map_as_a_cue_says_with_kernels_that_inhibition_sets_apart():
    class Static(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(DepthwiseConv(16, 3), nn.Conv2d(16, 16, 1))

    def batch():
        x = torch.zeros(16, 2, 8, 8)
        x[:, 0], cue = torch.randn(16, 8, 8), torch.randn(16).sign()
        x[torch.arange(16), 1, torch.randint(8, (16,)), torch.randint(8, (16,))] = 8 * cue
        return x, torch.where(cue[:, None, None] > 0, x[:, 0].roll(1, 2), x[:, 0].roll(-1, 2))

    def left(mixer):
        """The share of the variance that is not explained after training; and what comes before the mixer."""
        first = nn.Conv2d(2, 16, 1)
        net = nn.Sequential(first, mixer, nn.Conv2d(16, 1, 1))
        optimizer, late = torch.optim.Adam(net.parameters(), 0.02), []
        for step in range(200):
            x, target = batch()
            loss = (net(x)[:, 0] - target)[:, :, 1:-1].pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= 190:
                late.append(loss.item())
        return sum(late) / len(late), first

    torch.manual_seed(0)
    conv = AttentiveConv(16)
    (dynamic, first), (static, _) = left(conv), left(Static())
    assert static > 0.45  # half the sum of both shifts is the best that it can do
    assert dynamic < 0.4 * static

    def alike():
        """The mean cosine between the kernels of two channels of one image."""
        kernels = F.normalize(conv.kernels(first(batch()[0]).flatten(2).mT), dim=-1)
        return (kernels @ kernels.mT).abs().mean().item()

    inhibited = alike()
    nn.init.constant_(conv.inhibition, -60.0)
    assert inhibited < alike()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kernel must be odd, to keep the map's size, got 4"):
        AttentiveConv(4, kernel=4)
    with pytest.raises(ValueError, match="approximate must be none or tanh, got 'exact'"):
        AttentiveConv(4, approximate="exact")
    with pytest.raises(ValueError, match="causal must be False"):
        AttentiveConvTokens(4, causal=True)
    with pytest.raises(ValueError, match="takes no context"):
        AttentiveConvTokens(4)(torch.randn(1, 6, 4), torch.randn(1, 6, 4), grid=(2, 3))
