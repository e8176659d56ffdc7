"""Efficient probing: the equations, what each query reaches, and what it reads that a mean does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnlab
from attnlab.cost import count_flops
from attnlab.nn.cross.efficient_probing import EfficientProbing, likeness, mass_inside
from attnlab.recipes.poolings import POOLINGS, pooling
from attnlab.recipes.probing import LARS, Probe, encode, few_per_class, nearest, warm_cosine


def by_the_paper(m: EfficientProbing, x: Tensor) -> Tensor:
    """As the paper writes it: each token's values first, then a weighted sum for each query's block of channels."""
    a = torch.einsum("mc,bnc->bmn", m.queries * m.dim**-0.5, x).softmax(-1)
    v = F.linear(x, m.wv.weight, m.wv.bias).unflatten(-1, (len(m.queries), -1))
    return torch.einsum("bmn,bnmd->bmd", a, v).flatten(1)


@pytest.mark.parametrize("shrink", [1, 2])
def test_equals_the_papers_order_of_products(shrink: int) -> None:
    m = EfficientProbing(32, queries=4, shrink=shrink, bias=True).double()
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(m(x), by_the_paper(m, x), rtol=0, atol=1e-12)


def test_pooling_first_is_many_times_cheaper() -> None:
    m, x = EfficientProbing(256, queries=8), torch.randn(2, 64, 256)
    assert count_flops(m, x) < 0.1 * count_flops(lambda x: by_the_paper(m, x), x)


def test_the_order_of_tokens_does_not_matter_and_zero_queries_take_the_mean() -> None:
    m, x = EfficientProbing(16, queries=4).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x[:, torch.randperm(7)]), m(x))
    torch.testing.assert_close(m(x, torch.zeros(2, 4, 16, dtype=torch.float64)), m.wv(x).mean(1))


def test_a_query_reaches_its_own_block_alone() -> None:
    m, x = EfficientProbing(16, queries=4), torch.randn(2, 7, 16)
    (gradient,) = torch.autograd.grad(m(x)[:, 4:8].pow(2).sum(), m.queries)
    assert gradient[1].any() and not gradient[[0, 2, 3]].any()


def test_parameters_are_those_of_the_paper() -> None:
    assert sum(p.numel() for p in EfficientProbing(768).parameters()) == 614_400


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="queries"):
        EfficientProbing(32, queries=3)
    with pytest.raises(ValueError, match="shrink"):
        EfficientProbing(32, shrink=5)
    with pytest.raises(ValueError, match="x must"):
        EfficientProbing(32)(torch.randn(2, 3, 16))
    with pytest.raises(ValueError, match="queries must be"):
        EfficientProbing(32)(torch.randn(2, 3, 32), torch.zeros(2, 4, 32))
    with pytest.raises(ValueError, match="pooling"):
        pooling("max", 8)


@pytest.mark.parametrize("name", POOLINGS)
def test_every_pooling_makes_one_vector_and_trains_all_of_itself(name: str) -> None:
    options = {"ep": {"queries": 4}, "cbam": {"grid": (3, 4)}}.get(name, {})
    probe = Probe(32, 5, name, **options).train()
    logits = probe(torch.randn(6, 12, 32))
    assert logits.shape == (6, 5)
    logits.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in probe.parameters())


def test_reads_a_vit_layer_by_layer() -> None:
    vit, images = attnlab.build("vit", dim=16, depth=3, heads=2, image=16, patch=4), torch.randn(2, 3, 16, 16)
    vit.eval()
    assert encode(vit, images).shape == (2, 16, 16)
    for layer in (0, 2):
        wanted = vit.forward_features(images, layers=(layer,))[0].flatten(2).mT
        torch.testing.assert_close(encode(vit, images, layer=layer), wanted)
    assert encode(vit, images, class_token=True).shape == (2, 17, 16)


def test_neighbours_vote_and_few_are_drawn_of_each_class() -> None:
    labels = torch.arange(30) % 3
    known = F.one_hot(labels, 3).float() + 0.1 * torch.randn(30, 3)
    assert torch.equal(nearest(known, labels, torch.eye(3), k=5).argmax(1), torch.arange(3))
    assert torch.equal(labels[few_per_class(labels, 4)].bincount(), torch.full((3,), 4))
    with pytest.raises(ValueError, match="shots"):
        few_per_class(labels, 11)


def test_lars_steps_by_the_size_of_a_matrix() -> None:
    matrix, vector = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))
    before = matrix.detach().clone(), vector.detach().clone()
    optimiser = LARS([matrix, vector], lr=0.5, trust=0.01)
    matrix.grad, vector.grad = 1000 * torch.randn(3, 4), torch.randn(4)
    optimiser.step()
    torch.testing.assert_close((matrix - before[0]).norm(), 0.5 * 0.01 * before[0].norm())
    torch.testing.assert_close(vector, before[1] - 0.5 * vector.grad)
    assert warm_cosine(0) == 0 and warm_cosine(10) == 1 and warm_cosine(90) == pytest.approx(0)


def scattered(count: int, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, 16, 32) of noise; the class is written on two random tokens: which of two marks of four directions
    each (the pair of marks is the class), as a masked-image model spreads what it knows. Where they lie, too."""
    labels = torch.randint(0, 4, (count,))
    x, where = torch.randn(count, 16, 32), torch.rand(count, 16).argsort(1)[:, :2]
    for part, mark in enumerate((labels // 2, 2 + labels % 2)):
        x[torch.arange(count), where[:, part]] += 5 * directions[mark]
    return x, labels, where


def test_more_queries_read_what_a_mean_drowns() -> None:
    directions = F.normalize(torch.randn(4, 32), dim=1)
    x, labels, _ = scattered(512, directions)
    new, wanted, where = scattered(512, directions)
    found = {}
    for name, options in (("mean", {}), ("ep1", {"queries": 1}), ("ep8", {"queries": 8})):
        probe = Probe(32, 4, name.rstrip("18"), **options)
        optimiser = torch.optim.Adam(probe.parameters(), lr=0.01)
        for _ in range(120):
            optimiser.zero_grad()
            F.cross_entropy(probe(x), labels).backward()
            optimiser.step()
        found[name] = (probe.eval()(new).argmax(1) == wanted).float().mean().item()
    maps = probe.pooling.maps(new)
    assert found["mean"] < found["ep1"] < found["ep8"], found
    assert likeness(maps).mean() < 0.9
    marked = torch.zeros(512, 16).scatter_(1, where, 1.0)
    assert mass_inside(maps, marked).mean() > 1.5 * 2 / 16  # of a flat map: the share of two tokens of sixteen
