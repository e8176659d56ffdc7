"""VOLO: timm's network with the same weights, what training returns, and mixed tokens."""

import pytest
import torch

from attnlab.hub.official.volo import VOLO as Adapter
from attnlab.models.vision import volo
from attnlab.models.vision.volo import VOLO

ARGUMENTS = {
    "layers": [2, 1, 2], "img_size": 64, "num_classes": 7, "stem_hidden_dim": 8, "embed_dims": [16, 32, 32],
    "num_heads": [2, 4, 4], "mlp_ratios": [3, 2, 4], "downsamples": [True, False, False],
    "outlook_attention": [True, False, False], "post_layers": ["ca", "ca"],
}  # fmt: skip


def small(**keywords) -> VOLO:
    defaults = {"depths": (1, 1), "dims": (8, 16), "heads": (2, 2), "outlook": (True, False), "stem": 4, "image": 64}
    return VOLO(**{**defaults, "num_classes": 5, **keywords})


def test_equals_timm_with_the_same_weights(timm) -> None:
    names = {"mlp_ratios": "mlp_ratio"}
    theirs = timm.models.volo.VOLO(**{names.get(name, name): value for name, value in ARGUMENTS.items()}).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = Adapter.build(dict(ARGUMENTS), theirs.state_dict()).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (16, 16)])
def test_any_size_gives_logits_and_maps_at_both_resolutions(size: tuple[int, int]) -> None:
    net, x = small().eval(), torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    fine, coarse = net.forward_features(x)
    assert fine.shape == (2, 8, size[0] // 8, size[1] // 8)
    assert coarse.shape == (2, 16, size[0] // 16, size[1] // 16)


def test_evaluation_adds_half_of_the_largest_place_logits() -> None:
    net, x = small(mix_token=False), torch.randn(2, 3, 64, 64)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    logits, places, box = net(x)
    assert places.shape == (2, 16, 5)
    assert box == (0, 0, 0, 0)
    torch.testing.assert_close(net.eval()(x), logits + 0.5 * places.amax(1))


def test_mixed_tokens_are_swapped_on_the_fine_map_and_their_logits_swapped_back(monkeypatch) -> None:
    """With a network that treats each place alone, un-mixing undoes the mixing exactly."""
    box = (1, 0, 3, 2)
    monkeypatch.setattr(volo, "random_box", lambda grid, generator: box)
    net, x = small().train(), torch.randn(4, 3, 64, 64)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    net.groups = torch.nn.ModuleList(torch.nn.ModuleList() for _ in range(2))
    torch.nn.init.zeros_(net.positions.table)
    _, mixed, found = net(x)
    net.mix_token = False
    _, plain, _ = net(x)
    assert found == box
    torch.testing.assert_close(mixed, plain)


def test_mixing_changes_the_class_logits_and_depends_on_the_generator_alone() -> None:
    net, x = small().train(), torch.randn(4, 3, 64, 64)
    runs = [net(x, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert runs[0][2] == runs[1][2] != runs[2][2]
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_stochastic_depth_spares_the_outlookers_as_released() -> None:
    net = small(depths=(2, 2), drop_path=0.3)
    rates = [[round(block.drop_path.rate, 6) for block in group] for group in net.groups]
    assert rates == [[0.0, 0.0], [0.2, 0.3]]


def test_without_class_attention_the_head_reads_the_mean() -> None:
    net, x = small(class_layers=0, dense=False, mix_token=False).eval(), torch.randn(1, 3, 64, 64)
    places = net.forward_features(x)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(net(x), net.head(net.norm(places).mean(1)))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dense"):
        small(mean=True)
    with pytest.raises(ValueError, match="depths"):
        small(heads=(2,))
    with pytest.raises(ValueError, match="dims"):
        small(depths=(1, 1, 1), dims=(8, 16, 24), heads=(2, 2, 2), outlook=(True, False, False))
    with pytest.raises(ValueError, match="images"):
        small()(torch.randn(1, 3, 8, 64))
    with pytest.raises(ValueError, match="shrink once"):
        Adapter.build({**ARGUMENTS, "downsamples": [False, True, False]}, {})
