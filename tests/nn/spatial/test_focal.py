"""Focal modulation: the equation, its limits, its reach and cost, and timm's module as a peer."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.cost import count_flops, fit_growth
from attnlab.nn.spatial.focal import FocalModulation


def oracle(m: FocalModulation, x: torch.Tensor) -> torch.Tensor:
    """The equation, place by place in float64: `(B, C, H, W)`."""
    x = x.double()
    dim, height, width = x.shape[1:]
    w = {n: p.detach().double() for n, p in m.named_parameters()}
    projected = torch.einsum("oc,bchw->bohw", w["wqcg.weight"], x) + w["wqcg.bias"].view(-1, 1, 1)
    query, context, gates = projected[:, :dim], projected[:, dim : 2 * dim], projected[:, 2 * dim :]
    total = torch.zeros_like(query)
    for level in range(m.levels):
        kernel = w[f"convs.{level}.weight"][:, 0]
        reach = kernel.shape[-1] // 2
        seen = torch.zeros_like(context)
        for i in range(height):
            for j in range(width):
                for a in range(max(i - reach, 0), min(i + reach + 1, height)):
                    for b in range(max(j - reach, 0), min(j + reach + 1, width)):
                        seen[:, :, i, j] += kernel[:, a - i + reach, b - j + reach] * context[:, :, a, b]
        context = F.gelu(seen)
        total += gates[:, level, None] * context
    total += gates[:, -1:] * F.gelu(context.mean((2, 3), keepdim=True))
    if m.normalize:
        total /= m.levels + 1
    y = query * (torch.einsum("oc,bchw->bohw", w["wm.weight"], total) + w["wm.bias"].view(-1, 1, 1))
    if m.norm is not None:
        y = F.layer_norm(y.movedim(1, -1), (dim,), w["norm.weight"], w["norm.bias"]).movedim(-1, 1)
    return torch.einsum("oc,bchw->bohw", w["wo.weight"], y) + w["wo.bias"].view(-1, 1, 1)


def shaken(*args, **keywords) -> FocalModulation:
    module = FocalModulation(*args, **keywords).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"levels": 3, "window": 5, "normalize": True},
        {"levels": 1, "factor": 4, "post_norm": True},
        {"levels": 0},
        {"levels": 2, "window": 1, "factor": 0},
    ],
)
def test_is_its_equation(keywords):
    module, x = shaken(6, **keywords), torch.randn(2, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x), oracle(module, x))


def test_memory_format_changes_nothing():
    module, x = shaken(6), torch.randn(2, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x.contiguous(memory_format=torch.channels_last)), module(x))


def test_without_levels_each_place_sees_itself_and_the_mean_alone():
    module, x = shaken(6, levels=0), torch.randn(1, 6, 4, 5, dtype=torch.float64)
    shuffled = x.flatten(2)[..., torch.randperm(20)].view_as(x)
    mean_kept = shuffled.clone()
    mean_kept[..., 0, 0] = x[..., 0, 0]
    mean_kept[..., 0, 1] += (x - mean_kept).sum((2, 3))  # the same mean of x, so of its linear context
    torch.testing.assert_close(module(mean_kept)[..., 0, 0], module(x)[..., 0, 0])


def test_a_constant_map_stays_constant_away_from_the_border():
    module = shaken(6, levels=2, window=3)  # kernels 3 and 5 reach 1 + 2 places
    x = torch.randn(1, 6, 1, 1, dtype=torch.float64).expand(1, 6, 12, 11)
    inner = module(x)[..., 3:-3, 3:-3]
    torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_local_reach_is_the_sum_of_the_kernels_and_the_mean_reaches_everywhere(levels):
    module, x = shaken(4, levels=levels, window=3), torch.randn(1, 4, 21, 21, dtype=torch.float64, requires_grad=True)
    (everywhere,) = torch.autograd.grad(module(x)[0, :, 10, 10].sum(), x)
    assert (everywhere[0].abs().sum(0) > 0).all()
    with torch.no_grad():  # close the last gate, which lets the mean in
        module.wqcg.weight[-1] = 0
        module.wqcg.bias[-1] = 0
    (local,) = torch.autograd.grad(module(x)[0, :, 10, 10].sum(), x)
    rows = (local[0].abs().sum(0) > 0).any(1).nonzero()[:, 0]
    reach = sum((3 + 2 * level) // 2 for level in range(levels))
    assert (rows.min().item(), rows.max().item()) == (10 - reach, 10 + reach)


def test_closed_gates_leave_only_the_biases():
    module = shaken(6)
    with torch.no_grad():
        module.wqcg.weight[12:] = 0
        module.wqcg.bias[12:] = 0
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    query = F.linear(x.movedim(1, -1), module.wqcg.weight[:6], module.wqcg.bias[:6])
    torch.testing.assert_close(module(x), module.wo(query * module.wm.bias).movedim(-1, 1))
    assert torch.equal(module.gates(x), torch.zeros(1, 3, 4, 5, dtype=torch.float64))


def test_gates_are_the_ones_that_forward_uses():
    module, x = shaken(6), torch.randn(2, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(module.gates(x), module.wqcg(x.movedim(1, -1))[..., 12:].movedim(-1, 1))


@pytest.mark.parametrize(("spatial", "size"), [(1, (13,)), (3, (3, 4, 5))])
def test_works_on_sequences_and_volumes(spatial, size):
    module, x = shaken(6, spatial=spatial), torch.randn(2, 6, *size, dtype=torch.float64)
    assert module(x).shape == x.shape
    if spatial == 1:  # a row of a map, its kernels' middle rows: the same computation
        flat = shaken(6)
        with torch.no_grad():
            for two, one in zip(flat.convs, module.convs, strict=True):
                two.weight.zero_()
                two.weight[:, :, two.weight.shape[2] // 2] = one.weight
        rest = {n: p for n, p in module.state_dict().items() if not n.startswith("convs")}
        flat.load_state_dict(rest, strict=False)
        torch.testing.assert_close(flat(x[:, :, None])[:, :, 0], module(x))


def test_cost_is_linear_in_places():
    module, sides = FocalModulation(16), (16, 32, 64)
    with torch.no_grad():
        flops = [count_flops(module, torch.randn(1, 16, side, side)) for side in sides]
    assert fit_growth([side**2 for side in sides], flops) == pytest.approx(1.0, abs=1e-3)


def test_bad_arguments_and_inputs_are_named():
    with pytest.raises(ValueError, match=r"window must be odd and factor even.*got 4 and 2"):
        FocalModulation(8, window=4)
    with pytest.raises(ValueError, match="levels must be at least 0, got -1"):
        FocalModulation(8, levels=-1)
    with pytest.raises(ValueError, match="spatial must be 1, 2 or 3, got 4"):
        FocalModulation(8, spatial=4)
    with pytest.raises(ValueError, match=r"x must be \(B, 8, H, W\) and not empty, got \(1, 7, 4, 4\)"):
        FocalModulation(8)(torch.randn(1, 7, 4, 4))


@pytest.mark.parametrize("keywords", [{"levels": 3}, {"levels": 2, "window": 5, "normalize": True, "post_norm": True}])
def test_equals_timms_module(timm, keywords):
    from timm.layers import LayerNorm2d
    from timm.models.focalnet import FocalModulation as Peer

    ours = FocalModulation(12, **keywords)
    peer = Peer(
        12,
        focal_window=ours.convs[0].kernel_size[0],
        focal_level=ours.levels,
        use_post_norm=ours.norm is not None,
        normalize_modulator=ours.normalize,
        norm_layer=lambda dim, **k: LayerNorm2d(dim, eps=1e-5, **k),
    )
    names = {"wqcg": "f", "wm": "h", "wo": "proj", "convs": "focal_layers", "norm": "norm"}
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    state = {}
    for name, p in ours.state_dict().items():
        first, rest = name.split(".", 1)
        rest = rest.replace(".weight", ".0.weight") if first == "convs" else rest
        state[name] = peer.state_dict()[f"{names[first]}.{rest}"].reshape(p.shape)
    ours.load_state_dict(state)
    x = torch.randn(2, 12, 7, 9)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-5)
