"""RoMA's pre-training: clusters, what is seen of what, both losses, sizes, checkpoints, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlab
from attnlab import hub
from attnlab.hub.official import find
from attnlab.layouts import tiles
from attnlab.models.vision.roma import RoMA, sincos
from attnlab.recipes.adaptive_rotation import adaptive_rotation, choose_window, places, texture, turned
from attnlab.recipes.roma import RoMAPretraining, Segments, blocks, drawing_losses, pixels


def make(**keywords) -> RoMAPretraining:
    encoder = RoMA(dim=16, depth=4, patch=4, states=4, num_classes=0)
    return RoMAPretraining(encoder, width=16, **{"heads": 2, **keywords})


@pytest.mark.parametrize(
    ("size", "params"), [("tiny", 19_906_688), ("small", 36_571_136), ("base", 99_428_096), ("large", 303_943_904)]
)
def test_has_the_authors_number_of_parameters(size: str, params: int) -> None:
    with torch.device("meta"):
        net = RoMAPretraining(attnlab.build(f"roma_{size}", num_classes=0))
    fixed = 144 * (net.encoder.channels[0] + 512)  # the authors keep the positions, which never learn, as parameters
    assert sum(p.numel() for p in net.parameters()) + fixed == params
    depth = len(net.encoder.blocks)
    assert [tap + 1 for tap in net.taps] == ([6, 8, 10, 12] if depth == 12 else [12, 16, 20, 24])


def test_a_drawn_cluster_depends_on_the_clusters_before_it_and_no_others() -> None:
    net = make().double().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 3, 48, 48, dtype=torch.float64, requires_grad=True)
    drawn = net.forward_drawing(x).unflatten(1, (8, 16))
    for s in (0, 3, 7):
        (gradient,) = torch.autograd.grad(drawn[0, s].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(0).unflatten(1, (3, 16)).unflatten(0, (3, 16)).sum((1, 3)).flatten() > 0
        assert seen.tolist() == [cluster <= s for cluster in range(9)]


def test_segments_are_the_authors_mask() -> None:
    mask = torch.tril(torch.ones(3, 3)).repeat_interleave(4, 0).repeat_interleave(4, 1).bool()
    assert torch.equal(Segments(4).matrix(12), mask)


def test_clusters_go_there_and_back() -> None:
    order, x = tiles((12, 12), 4), torch.arange(144).view(12, 12)
    tokens = order.apply(x.flatten(), dim=0)
    assert tokens[:5].tolist() == [0, 1, 2, 3, 12] and tokens[16] == 4 and tokens[48] == 48
    assert torch.equal(order.invert(tokens, dim=0), x.flatten())


def test_pixels_are_normed_patches_with_channels_last() -> None:
    images = torch.randn(2, 3, 8, 12)
    patch = images[1, :, 4:8, 8:12].permute(1, 2, 0).flatten()
    torch.testing.assert_close(pixels(images, 4)[1, 5], (patch - patch.mean()) / (patch.var() + 1e-6).sqrt())


def test_a_perfect_drawing_costs_nothing_and_in_the_release_its_blocks_do() -> None:
    images = torch.randn(2, 3, 24, 24)
    perfect = tiles((12, 12), 4).apply(pixels(images, 2))[:, 16:]
    assert [loss.item() for loss in drawing_losses(perfect, images, patch=2)] == [0.0, 0.0]
    fine, coarse = drawing_losses(perfect, images, patch=2, variant="release")
    assert fine.item() == 0.0 and coarse.item() > 0.5
    drawn, wanted = blocks(torch.randn(2, 128, 12), pixels(images, 2), (12, 12))
    assert drawn.shape == wanted.shape == (2, 3, 36 * 12)
    torch.testing.assert_close(wanted[0, 0, :12], pixels(images, 2)[0, 6])  # the second block begins in column 6


def test_turned_patches_are_told_and_targets_are_those_given() -> None:
    net, x = make(), torch.randn(2, 3, 48, 48)
    none = torch.zeros(2, 144, dtype=torch.bool)
    torch.testing.assert_close(net(x, x, none), net(x))
    some = none.clone()
    some[:, 3] = True
    assert not torch.allclose(net(x, x, some), net(x)) and not torch.allclose(net(x, 1 - x.flip(3)), net(x))
    net(x, x, some).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def authors_names(net: RoMAPretraining) -> dict[str, Tensor]:
    """The state of `net` as the authors' code names it, with what is fixed there."""
    table = (
        ("encoder.patches.", "patch_embed.proj."), ("encoder.blocks.", "layers."), ("encoder.norm.", "norm_4."),
        ("norms.0.", "norm_1."), ("norms.1.", "norm_2."), ("norms.2.", "norm_3."), ("blocks.", "dec_block."),
        ("widen.", "enc2dec."), ("norm.", "ar_norm."), ("draw.", "ar_pred."),
    )  # fmt: skip
    layer = {"wi": "in_proj", "conv": "conv1d", "wx": "x_proj", "wdelta": "dt_proj", "a_log": "A_log", "skip": "D",
             "wo": "out_proj"}  # fmt: skip
    found = {}
    for name, t in net.state_dict().items():
        if name in ("token", "angle"):
            found[{"token": "ar_token", "angle": "angle_embed"}[name]] = t[None, None]
            continue
        ours, theirs = next(pair for pair in table if name.startswith(pair[0]))
        head, rest = theirs, name.removeprefix(ours)
        if ".mixer." in rest:
            block, part = rest.split(".mixer.")
            first, dot, last = part.partition(".")
            t = t.unsqueeze(1) if part == "conv.weight" else t
            rest = f"{block}.mixer.{layer[first]}{dot}{last}"
        elif theirs == "layers." and ".mlp." in rest:
            rest = rest.replace("w2", "x").replace("w3", "w2").replace("x", "w3")
        elif ".attention.wqkv." in rest:
            block, part = rest.split(".attention.wqkv.")
            third = len(t) // 3
            found[f"{head}{block}.attn2.q.{part}"], found[f"{head}{block}.attn2.kv.{part}"] = t[:third], t[third:]
            continue
        for a, b in (("attention.wo", "attn2.proj"), ("norm_q", "norm2_1"), ("norm_kv", "norm2_2")):
            rest = rest.replace(a, b)
        found[head + rest] = t
    return {**found, "pos_embed": sincos((12, 12), 16)[None], "mask": torch.zeros(128, 128)}


def test_loads_the_authors_checkpoints(tmp_path) -> None:
    net = make(heads=1, variant="release").eval()
    params = authors_names(net)
    again = find("MiliLab/RoMA", "models_mamba.VisionMamba").build({}, params)
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), net(x))
    torch.save(params, tmp_path / "pretrained.pt")
    encoder = RoMA(dim=16, depth=4, patch=4, states=4, num_classes=0)
    hub.load_official(encoder, tmp_path / "pretrained.pt")
    with torch.no_grad():
        assert torch.equal(encoder(x), net.encoder(x))


def lbp_by_hand(patch: Tensor) -> float:
    gray, counts = patch.mean(0), [0] * 255
    for i in range(len(gray)):
        for j in range(len(gray)):
            code = 0
            if 0 < i < len(gray) - 1 and 0 < j < len(gray) - 1:
                around = [(-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1)]
                code = sum(2**bit for bit, (a, b) in enumerate(around) if gray[i + a, j + b] >= gray[i, j])
            counts[min(code, 254)] += 1
    return math.sqrt(sum((c / gray.numel()) ** 2 for c in counts))


def test_texture_is_the_length_of_the_histogram_of_patterns() -> None:
    image = torch.randn(3, 16, 24)
    image[:, :8, :8] = 0.5
    scores = texture(image, 8)
    for row, column in ((0, 0), (1, 2)):
        patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert scores[row, column].item() == pytest.approx(lbp_by_hand(patch), rel=1e-5)
    assert scores.argmax() == 0


def test_the_window_is_the_largest_that_is_worth_it() -> None:
    scores = torch.zeros(12, 12)
    scores[7, 8] = 1.0
    assert choose_window(scores) == (2, 3, 6)  # all that hold the peak are equal: the first
    scores = torch.full((12, 12), 0.9)
    scores[:11, :11], scores[0, 0] = 0.1, 5.0  # the mean is 0.26; 36 patches around the peak have 0.24, 16 have 0.41
    assert choose_window(scores) == (0, 0, 4)
    scores[0, 0] = 1.0  # the mean is 0.23; 16 patches around the peak have 0.16
    assert choose_window(scores) == (0, 0, 2)
    assert choose_window(torch.rand(4, 5)).side == 4


def test_turning_is_counter_clockwise_about_the_centre() -> None:
    square = torch.randn(3, 6, 6)
    for quarter in range(4):
        torch.testing.assert_close(turned(square, 90.0 * quarter), torch.rot90(square, quarter, (1, 2)))
    assert turned(torch.ones(1, 8, 8), 45.0)[0, 0, 0] == 0


def test_rotation_changes_the_window_alone_and_leaves_the_image() -> None:
    image = torch.rand(3, 192, 192)
    before = image.clone()
    found = adaptive_rotation(image, generator=torch.Generator().manual_seed(1))
    assert torch.equal(image, before) and abs(found.degrees) <= 45
    top, left, side = (16 * n for n in found.window)
    outside = torch.ones(192, 192, dtype=torch.bool)
    outside[top : top + side, left : left + side] = False
    assert torch.equal(found.image[:, outside], image[:, outside])
    assert not torch.equal(found.image, image)
    again = adaptive_rotation(image, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.image, found.image)
    marked = places(found.window, (12, 12)).view(12, 12)
    assert marked.sum() == found.window.side**2 and marked[found.window.top, found.window.left]
    release = places(found.window, (12, 12), variant="release").view(12, 12)
    assert torch.equal(release.nonzero(), torch.arange(found.window.side)[:, None].expand(-1, 2))


def test_learns_to_draw_better_than_the_mean_of_the_cluster_before() -> None:
    data = pytest.importorskip("skimage.data")
    photo = torch.tensor(data.astronaut(), dtype=torch.float32).permute(2, 0, 1) / 127.5 - 1
    pictures = F.unfold(photo[None], 48, stride=48)[0].T.unflatten(1, (3, 48, 48))
    test, train = pictures[::4], pictures[torch.arange(len(pictures)) % 4 != 0]
    torch.manual_seed(0)
    net = RoMAPretraining(RoMA(dim=32, depth=2, patch=4, states=4, num_classes=0), width=32, heads=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    rng, losses = torch.Generator().manual_seed(0), []
    for _ in range(60):
        loss = net(train[torch.randint(len(train), (8,), generator=rng)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    with torch.no_grad():
        clusters = tiles((12, 12), 4).apply(pixels(test, 4)).unflatten(1, (9, 16))
        before = clusters[:, :-1].mean(2, keepdim=True).expand_as(clusters[:, 1:])
        fine, _ = drawing_losses(net.eval().forward_drawing(test), test, patch=4)
    assert fine < F.mse_loss(before, clusters[:, 1:])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RoMAPretraining(nn.Linear(2, 2)), TypeError, "encoder must be a RoMA"),
        (lambda: make(variant="code"), ValueError, "variant must be"),
        (lambda: make()(torch.zeros(1, 3, 24, 24)), ValueError, "several clusters of 4² patches"),
        (lambda: make()(torch.zeros(1, 3, 48, 48), None, torch.zeros(1, 3)), ValueError, "turned must have shape"),
        (lambda: make(side=5)(torch.zeros(1, 3, 48, 48)), ValueError, "side must divide the grid"),
        (lambda: drawing_losses(torch.zeros(1, 3, 3), torch.zeros(1, 3, 48, 48), patch=4), ValueError, "drawn must"),
        (lambda: pixels(torch.zeros(1, 3, 5, 4), 4), ValueError, "sides multiples of patch=4"),
        (lambda: texture(torch.zeros(3, 20, 16)), ValueError, "sides multiples of patch=16"),
        (lambda: choose_window(torch.zeros(1, 1)), ValueError, "sides must have one"),
        (lambda: places(choose_window(torch.rand(6, 6)), (6, 6), variant="x"), ValueError, "variant must be"),
    ],
)
def test_errors_name_what_is_wrong(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
