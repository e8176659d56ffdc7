"""The Axial Transformer: the oracle is a transcription of its equations, place by place where they are."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from attnlab.models.vision.axial import AxialBlock, AxialTransformer
from attnlab.models.vision.axial_encoder import AxialEncoder

SMALL = dict(dim=8, levels=5, size=(3, 4), channels=2, heads=2, exterior=2, outer=2, inner=2)


def shaken(**arguments) -> AxialTransformer:
    torch.manual_seed(0)
    model = AxialTransformer(**{**SMALL, **arguments}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def block_oracle(b: AxialBlock, x: Tensor, axis: str, masked: bool) -> Tensor:
    """A block on (H, W, C), its attention over `axis`, "h" or "w"."""
    z = F.layer_norm(x, x.shape[-1:], b.norm1.weight, b.norm1.bias, 1e-5)
    wqkv = b.attention.wqkv
    q, k, v = (t.unflatten(-1, (b.attention.heads, -1)) for t in (z @ wqkv.weight.T + wqkv.bias).chunk(3, -1))
    if axis == "h":
        scores = torch.einsum("iwhd,jwhd->whij", q, k)
    else:
        scores = torch.einsum("rihd,rjhd->rhij", q, k)
    scores = scores / math.sqrt(q.shape[-1])
    if masked:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~keep, -1e9)
    mixed = torch.einsum("whij,jwhd->iwhd" if axis == "h" else "rhij,rjhd->rihd", scores.softmax(-1), v)
    x = x + b.attention.wo(mixed.flatten(-2))
    z = b.mlp.fc1(F.layer_norm(x, x.shape[-1:], b.norm2.weight, b.norm2.bias, 1e-5))
    return x + b.mlp.fc2(z * torch.sigmoid(1.702 * z))


def oracle(m: AxialTransformer, image: Tensor, channel: int) -> Tensor:
    """Logits (H, W, levels) of one channel of one image (C, H, W)."""
    height, width = m.size
    cond = 0.0
    if m.channels > 1:
        planes = torch.zeros(2 * m.channels, height, width, dtype=torch.float64)
        planes[:channel] = image[:channel] / (m.levels - 1)
        planes[m.channels + channel] = 1.0
        cond = m.conv(planes[None])[0].permute(1, 2, 0)
        cond = cond + m.exterior_places.rows[:, None] + m.exterior_places.columns[None]
        for i, b in enumerate(m.exterior):
            cond = block_oracle(b, cond, "wh"[i % 2], False)
    h = m.embedding.weight[image[channel]]
    pos = m.places.rows[:, None] + m.places.columns[None]
    u = h + pos + cond
    for i, b in enumerate(m.outer):
        u = block_oracle(b, u, "wh"[i % 2], i % 2 == 1)
    down, right = torch.zeros_like(u), torch.zeros_like(h)
    down[1:], right[:, 1:] = u[:-1], h[:, :-1]
    r = right + down + pos + cond
    for b in m.inner:
        r = block_oracle(b, r, "w", True)
    return m.head(F.layer_norm(r, r.shape[-1:], m.norm.weight, m.norm.bias, 1e-5))


@pytest.mark.parametrize("channels", [1, 3])
def test_equals_the_equations(channels: int) -> None:
    m = shaken(channels=channels)
    images = torch.randint(0, 5, (2, channels, 3, 4))
    with torch.no_grad():
        found = m(images)
        for b in range(2):
            for c in range(channels):
                torch.testing.assert_close(found[b, c], oracle(m, images[b], c))
        chosen = torch.tensor([channels - 1, 0])
        one = m.channel_logits(images, chosen)
    torch.testing.assert_close(one, found[torch.arange(2), chosen])


def test_a_place_depends_on_the_places_before_it_and_on_all_of_them() -> None:
    m = shaken()
    image = torch.randint(0, 5, (2, 3, 4))
    changed = image.flatten().repeat(24, 1)
    changed.diagonal().add_(1).remainder_(5)
    with torch.no_grad():
        logits, before = m(changed.unflatten(1, (2, 3, 4))), m(image[None])
    moved = ((logits - before).abs().amax(-1) > 1e-9).flatten(1)  # [which place was changed, which logits moved]
    assert torch.equal(moved, torch.ones(24, 24, dtype=torch.bool).triu(1))


@pytest.mark.parametrize("channels", [1, 2])
def test_sampling_by_rows_equals_sampling_from_whole_forwards(channels: int) -> None:
    m = shaken(channels=channels, outer=4)
    noise = -torch.empty(2, channels, 3, 4, 5, dtype=torch.float64).exponential_().log()
    slow = torch.zeros(2, channels, 3, 4, dtype=torch.long)
    with torch.no_grad():
        for c in range(channels):
            for i in range(3):
                for j in range(4):
                    slow[:, c, i, j] = (m(slow)[:, c, i, j] + noise[:, c, i, j]).argmax(-1)
    assert torch.equal(m.sample(2, noise=noise), slow)
    assert len(slow.unique()) >= 3  # or nothing was sampled


def test_starts_uniform() -> None:
    m = AxialTransformer(**SMALL)
    loss = F.cross_entropy(m(torch.randint(0, 5, (2, 2, 3, 4))).flatten(0, 3), torch.randint(0, 5, (48,)))
    assert abs(loss.item() - math.log(5)) < 1e-3


def test_learns_digits_better_than_independent_pixels() -> None:
    torch.manual_seed(0)
    digits = torch.tensor(load_digits().images > 7.5).long()[:, None]
    train, test = digits[:1500], digits[1500:]
    rate = (train.float().mean(0) * 1500 + 1) / 1502
    independent = F.binary_cross_entropy(rate.expand(len(test), -1, -1, -1), test.float()).item()
    m = AxialTransformer(dim=32, levels=2, size=8, channels=1, heads=4, outer=2, inner=1)
    optimizer = torch.optim.Adam(m.parameters(), 4e-3)
    for _ in range(70):
        batch = train[torch.randint(0, 1500, (64,))]
        optimizer.zero_grad()
        F.cross_entropy(m(batch).flatten(0, 3), batch.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        found = F.cross_entropy(m.eval()(test).flatten(0, 3), test.flatten()).item()
    assert found < 0.9 * independent


def test_two_streams_are_reversible() -> None:
    torch.manual_seed(0)
    m = AxialEncoder(8, depth=1, heads=2, streams=2).double().eval()
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    maps = x.permute(0, 2, 3, 1)
    f1, g1, f2, g2 = m.branches
    with torch.no_grad():
        a = maps + f1(maps)
        b = maps + g1(a)
        a = a + f2(b)
        b = b + g2(a)
        torch.testing.assert_close(m(x), ((a + b) / 2).permute(0, 3, 1, 2))
        b, last = b - g2(a), a
        torch.testing.assert_close(last - f2(b), maps + f1(maps))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="outer"):
        AxialTransformer(**{**SMALL, "outer": 3})
    m = AxialTransformer(**SMALL)
    with pytest.raises(ValueError, match="images"):
        m(torch.zeros(1, 2, 4, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="images"):
        m(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="noise"):
        m.sample(1, noise=torch.zeros(1, 2, 3, 4, 6))
    with pytest.raises(ValueError, match="streams"):
        AxialEncoder(8, streams=3)
