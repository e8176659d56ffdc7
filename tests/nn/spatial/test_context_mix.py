"""Context mixing: place by place written out, its kernels, small maps, and what a static kernel cannot do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.spatial.context_mix import ContextMix, dynamic_conv


def slow_dynamic_conv(weights, values):
    side, (height, width) = int(weights.shape[-1] ** 0.5), values.shape[2:4]
    out = torch.zeros_like(values)
    for i in range(height):
        for j in range(width):
            top, left = (min(max(n - side // 2, 0), size - side) for n, size in ((i, height), (j, width)))
            window = values[:, :, top : top + side, left : left + side].flatten(2, 3)
            out[:, :, i, j] = (weights[:, :, i, j, :, None] * window).sum(2)
    return out


@pytest.mark.parametrize(("size", "kernel"), [((5, 5), 5), ((7, 9), 7), ((4, 18), 3), ((6, 35), 5), ((3, 40), 1)])
def test_dynamic_convolution_equals_its_windows_one_by_one(size, kernel):
    weights = torch.randn(2, 2, *size, kernel**2, dtype=torch.float64)
    values = torch.randn(2, 2, *size, 3, dtype=torch.float64)
    torch.testing.assert_close(dynamic_conv(weights, values), slow_dynamic_conv(weights, values))


def shaken(module: nn.Module) -> nn.Module:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else nn.init.normal_(tensor, std=0.4)
    return module.double().eval()


def test_equals_the_equations_written_out():
    mix = shaken(ContextMix(8, heads=1, kernel=5, small=3))
    x = torch.randn(1, 8, 6, 7, dtype=torch.float64)
    q, r, v = mix.wq(x) * 4**-0.5, mix.wk(F.adaptive_avg_pool2d(x, 7)), mix.wv(x)
    parts = []
    for part, (side, table) in enumerate(((3, mix.tables[0]), (5, mix.tables[1]))):
        weights = torch.zeros(1, 2, 6, 7, side**2, dtype=torch.float64)
        for g in range(2):
            own, regions = q[0, 2 * g : 2 * g + 2], r[0, 2 * g : 2 * g + 2].flatten(1)
            for i in range(6):
                for j in range(7):
                    affinity = own[:, i, j] @ regions  # 49 numbers
                    logits = mix.wp(affinity)[9 * part : 9 + 25 * part]
                    top, left = min(max(i - side // 2, 0), 6 - side), min(max(j - side // 2, 0), 7 - side)
                    for a in range(side):
                        for b in range(side):
                            logits[a * side + b] += table[g, top + a - i + side - 1, left + b - j + side - 1]
                    weights[0, g, i, j] = logits.softmax(0)
        half = v[:, 4 * part : 4 * part + 4].unflatten(1, (2, 2)).permute(0, 1, 3, 4, 2)
        parts.append(slow_dynamic_conv(weights, half).permute(0, 1, 4, 2, 3).flatten(1, 2))
    torch.testing.assert_close(mix(x), mix.wo(torch.cat(parts, 1)))


def test_without_affinities_and_tables_it_is_the_mean_of_the_windows():
    mix, x = shaken(ContextMix(8, heads=1)), torch.randn(1, 8, 9, 8, dtype=torch.float64)
    for p in (mix.wp.weight, mix.wp.bias, *mix.tables):
        nn.init.zeros_(p)
    for kernels, side in zip(mix.kernels(x, x), (5, 7), strict=True):
        assert kernels.shape == (1, 2, 9, 8, side**2)
        torch.testing.assert_close(kernels, torch.full_like(kernels, side**-2))


def test_kernels_sum_to_one():
    mix, x = shaken(ContextMix(8, heads=1)), torch.randn(2, 8, 9, 8, dtype=torch.float64)
    for kernels in mix.kernels(x, x):
        torch.testing.assert_close(kernels.sum(-1), torch.ones_like(kernels[..., 0]))


def test_a_map_smaller_than_the_kernel_is_enlarged_and_averaged_back():
    mix = shaken(ContextMix(8, heads=1, kernel=7))
    assert [mix.enlarged(size) for size in ((5, 6), (6, 5), (1, 3), (7, 2), (9, 8))] == [
        (7, 8), (8, 7), (7, 21), (24, 7), (9, 8),
    ]  # fmt: skip
    mix.wo = nn.Identity()
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    large = F.interpolate(x, (7, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(mix(x), F.adaptive_avg_pool2d(mix(large), (5, 6)))


def test_it_shifts_a_map_as_a_far_cue_says_and_a_static_kernel_cannot():
    class Static(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(DepthwiseConv(16, 7), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))

    def left(mixer):
        """The share of the variance that is not explained after training."""
        net = nn.Sequential(nn.Conv2d(2, 16, 1), mixer, nn.Conv2d(16, 1, 1))
        optimizer, late = torch.optim.Adam(net.parameters(), 0.02), []
        for step in range(60):
            x = torch.zeros(16, 2, 8, 8)
            x[:, 0], cue = torch.randn(16, 8, 8), torch.randn(16).sign()
            x[torch.arange(16), 1, torch.randint(8, (16,)), torch.randint(8, (16,))] = 8 * cue
            target = torch.where(cue[:, None, None] > 0, x[:, 0].roll(1, 2), x[:, 0].roll(-1, 2))
            loss = (net(x)[:, 0] - target)[:, :, 1:-1].pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= 55:
                late.append(loss.item())
        return sum(late) / len(late)

    torch.manual_seed(0)
    dynamic, static = left(ContextMix(16, heads=2, kernel=3, small=3, regions=4)), left(Static())
    assert static > 0.45  # half the sum of both shifts is the best that it can do
    assert dynamic < 0.4 * static


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dim must be a multiple of 4 · heads, got 8 and 3"):
        ContextMix(8, heads=3)
    with pytest.raises(ValueError, match="kernel and small must be odd, and small at most kernel, got 5 and 7"):
        ContextMix(8, kernel=5, small=7)
    with pytest.raises(ValueError, match="context goes with context_dim, got Tensor and None"):
        ContextMix(8)(torch.randn(1, 8, 7, 7), torch.randn(1, 4, 7, 7))
