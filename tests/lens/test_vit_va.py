"""The visual analytics of vision transformers: its measures against loops, and what must hold of them."""

import math

import pytest
import torch
from torch.nn import functional as F

from attnlab.lens.measures import patterns, pruning, spatial
from attnlab.lens.measures.pruning import Answer, changes, importance, jensen_shannon
from attnlab.lens.measures.spatial import strength

GRID = (3, 4)


def attention(*leading, prefix=1, grid=GRID):
    n = prefix + math.prod(grid)
    return torch.randn(*leading, n, n, dtype=torch.float64).mul(2).softmax(-1)


# Strength by hop


def hop_of(a, b, kind, columns):
    down, across = abs(a // columns - b // columns), abs(a % columns - b % columns)
    if kind == "chebyshev":
        return max(down, across)
    return down + across if kind == "manhattan" else round(math.hypot(down, across))


def naive_strength(weights, grid, prefix, kind):
    """The sheet's sums, one patch at a time: of one (N, N) map of each image."""
    n = math.prod(grid)
    count = 1 + max(hop_of(a, b, kind, grid[1]) for a in range(n) for b in range(n))
    total, means = [0.0] * count, [[] for _ in range(count)]
    for image in weights.tolist():
        for a in range(n):
            rings = [[] for _ in range(count)]
            for b in range(n):
                rings[hop_of(a, b, kind, grid[1])].append(image[prefix + a][prefix + b])
            for k, ring in enumerate(rings):
                total[k] += sum(ring) / (n * len(weights))
                if ring:
                    means[k].append(sum(ring) / len(ring))
    return torch.tensor(total).double(), torch.tensor([sum(m) / len(m) for m in means]).double()


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("kind", spatial.HOPS)
def test_strength_by_hop_is_what_loops_over_patches_give(kind, prefix):
    weights = attention(2, 3, 2, prefix=prefix)  # images, layers, heads
    found = strength(weights, GRID, prefix=prefix, hop=kind)
    for layer in range(3):
        for head in range(2):
            wanted = naive_strength(weights[:, layer, head], GRID, prefix, kind)
            torch.testing.assert_close(found.sum[layer, head], wanted[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.mean[layer, head], wanted[1], rtol=1e-6, atol=1e-6)
    assert found.query_sum.shape == (3, 2, 12, found.sum.shape[-1])
    torch.testing.assert_close(found.query_sum.mean(-2), found.sum)
    centre, spread = found.profile()
    torch.testing.assert_close(centre, found.sum.mean(1))
    torch.testing.assert_close(spread, found.sum.std(1, correction=0))


@pytest.mark.parametrize("kind", spatial.HOPS)
def test_strength_and_the_class_tokens_share_make_up_all_attention(kind):
    found = strength(attention(2, 3, prefix=2), GRID, hop=kind)
    torch.testing.assert_close(found.sum.sum(-1) + found.prefix_share, torch.ones(3).double())
    alone = strength(attention(2, 3, prefix=2), GRID, hop=kind, renormalise=True)
    torch.testing.assert_close(alone.sum.sum(-1), torch.ones(3).double())


@pytest.mark.parametrize("kind", spatial.HOPS)
def test_uniform_attention_has_the_same_mean_at_all_hops_though_borders_cut_rings(kind):
    n = math.prod(GRID)
    found = strength(torch.full((1, n, n), 1 / n).double(), GRID, hop=kind)
    torch.testing.assert_close(found.mean, torch.full_like(found.mean, 1 / n))


def test_a_head_that_looks_at_itself_has_all_strength_at_hop_zero():
    found = strength(torch.eye(12)[None], GRID)
    assert found.sum.tolist() == [1, 0, 0, 0] and found.distance == 0


def test_expected_distance_is_that_of_a_shift_by_two_columns():
    grid = (2, 5)
    shifted = torch.zeros(10, 10)
    for q in range(10):
        shifted[q, q + 2 if q % 5 < 3 else q - 2] = 1
    found = strength(shifted[None], grid)
    assert found.distance == 2
    torch.testing.assert_close(found.query_distance, torch.full((10,), 2.0))


def test_strength_refuses_a_grid_that_does_not_fit():
    with pytest.raises(ValueError, match="grid \\(3, 5\\) has 15 patches, but weights have 13 tokens"):
        strength(attention(1), (3, 5))
    with pytest.raises(ValueError, match="after 2 other tokens"):
        strength(attention(1), GRID, prefix=2)
    with pytest.raises(ValueError, match="hop must be one of chebyshev"):
        strength(attention(1), GRID, hop="king")


# Importance


def test_jensen_shannon_is_symmetric_bounded_zero_for_equals_and_the_square_of_scipys():
    distance = pytest.importorskip("scipy.spatial.distance")
    p, q = torch.randn(2, 20, 7, dtype=torch.float64).mul(4).softmax(-1)
    found = jensen_shannon(p, q)
    torch.testing.assert_close(found, torch.as_tensor(distance.jensenshannon(p, q, base=2, axis=-1) ** 2))
    torch.testing.assert_close(found, jensen_shannon(q, p))
    assert (found > 0).all() and (found <= 1).all()
    assert (jensen_shannon(p, p) == 0).all()
    corners = torch.eye(3).double()
    assert (jensen_shannon(corners, corners.roll(1, 0)) == 1).all()


def naive_changes(full, pruned, labels):
    """Each metric of the sheet, of one image at a time."""
    found = {name: [] for name in pruning.METRICS}
    for i, label in enumerate(labels):
        p, q = ([math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in (full[0][i], pruned[0][i]))
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        kl = [sum(a * math.log2(a / c) for a, c in zip(x, m, strict=True)) for x in (p, q)]
        guess, after = p.index(max(p)), q.index(max(q))
        a, b = full[1][i], pruned[1][i]
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        found["jsd"].append(sum(kl) / 2)
        found["d_prob"].append(p[label] - q[label])
        found["abs_d_pred"].append(abs(p[guess] - q[guess]))
        found["acc_drop"].append(float(guess == label) - float(after == label))
        found["cls_cos"].append(1 - dot / math.hypot(*a) / math.hypot(*b))
    return found


def test_the_five_metrics_are_what_a_loop_over_images_gives():
    full, pruned = ((torch.randn(9, 4).double(), torch.randn(9, 6).double()) for _ in range(2))
    labels = torch.randint(4, (9,))
    found = changes(Answer(*full), Answer(*pruned), labels)
    wanted = naive_changes(*([x.tolist() for x in pair] for pair in (full, pruned)), labels.tolist())
    assert set(found) == set(pruning.METRICS)
    for name, values in found.items():
        torch.testing.assert_close(values, torch.tensor(wanted[name]).double(), rtol=1e-6, atol=1e-9)


class TwoLayers:
    """Classes from a sum over heads and layers, in which head outputs and their projections are at hand."""

    def __init__(self, heads=(3, 2), images=8, classes=4):
        self.outputs = [torch.randn(images, h, 5) for h in heads]
        self.wo = [torch.randn(h, 5, 6) for h in heads]
        self.classify = torch.randn(6, classes)
        self.labels = torch.arange(images) % classes

    def __call__(self, pruned):
        x = torch.zeros(8, 6)
        for layer, (out, wo) in enumerate(zip(self.outputs, self.wo, strict=True)):
            keep = ~pruned.get(layer, torch.zeros(len(wo), dtype=torch.bool))
            x = x + torch.einsum("ihd,hdc->ic", out * keep[:, None], wo)
        return Answer(x @ self.classify, x)


def test_a_head_whose_projection_is_zero_has_importance_zero_by_every_metric():
    model = TwoLayers()
    model.wo[0][1] = 0
    found = importance(model, [3, 2], model.labels)
    assert all(scores[0, 1] == 0 for scores in found.scores.values())
    assert all((table[:, 0, 1] == 0).all() for table in found.per_class.values())
    assert (found.scores["jsd"][0, [0, 2]] > 0).all() and (found.scores["jsd"][1, :2] > 0).all()
    assert found.scores["jsd"][1, 2].isnan()  # the second layer has two heads
    assert found.ranks()[0, 1] == 5 and found.ranks()[1, 2] == -1
    assert sorted(found.ranks().flatten().tolist()) == [-1, 1, 2, 3, 4, 5]
    assert found.top(-1) == [(0, 1)] and len(found.top(2)) == 2


@pytest.mark.parametrize("mode", ["leave_one_out", "keep_one"])
def test_importance_prunes_the_head_or_all_others_of_its_layer(mode):
    model = TwoLayers()
    found = importance(model, [3, 2], model.labels, mode=mode)
    silent = torch.tensor([False, False, True])
    pruned = {0: silent if mode == "leave_one_out" else ~silent}
    wanted = changes(model({}), model(pruned), model.labels)
    for name, values in wanted.items():
        torch.testing.assert_close(found.scores[name][0, 2], values.mean())
        by_class = torch.stack([values[model.labels == c].mean() for c in range(4)])
        torch.testing.assert_close(found.per_class[name][:, 0, 2], by_class)
    best = found.scores["jsd"].nan_to_num(-1 if mode == "leave_one_out" else 9)
    best = best.argmax() if mode == "leave_one_out" else best.argmin()
    assert found.ranks().flatten()[best] == 1


def test_rank_correlation_of_metrics_is_scipys_ties_included():
    stats = pytest.importorskip("scipy.stats")
    model = TwoLayers()
    found = importance(model, [3, 2], model.labels)
    found.scores["d_prob"][0, 0] = found.scores["d_prob"][1, 1]
    names, matrix = found.correlation()
    assert names == list(found.scores)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            x, y = (found.scores[m].flatten()[:5] for m in (a, b))
            torch.testing.assert_close(matrix[i, j].item(), float(stats.spearmanr(x, y).statistic), equal_nan=True)


def test_without_labels_only_what_needs_none_is_measured_and_classes_are_those_predicted():
    model = TwoLayers()
    found = importance(model, [3, 2])
    assert list(found.scores) == ["jsd", "abs_d_pred", "cls_cos"]
    assert found.classes.tolist() == sorted(set(model({}).logits.argmax(-1).tolist()))
    with pytest.raises(ValueError, match=r"'acc_drop' was not measured \(it needs labels\); there are jsd"):
        found.ranks("acc_drop")
    with pytest.raises(ValueError, match="labels must be classes from 0 to 3"):
        importance(model, [3, 2], model.labels + 1)
    with pytest.raises(ValueError, match="labels must be \\(8,\\)"):
        importance(model, [3, 2], model.labels[:5])


# Patterns


def rows(weights):
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("grid", [(7, 7), (4, 6)])
def test_a_template_is_most_similar_to_itself(grid):
    for name, masks in patterns.templates(grid).items():
        names, cosines = patterns.label(rows(masks), grid)
        assert names == [name] * len(masks)
        torch.testing.assert_close(cosines, torch.ones(len(masks)))


def test_stripes_are_fixed_keys_and_uniform_attention_is_not():
    stripes = torch.zeros(1, 49, 49)
    stripes[..., [3, 17]] = 0.5
    assert patterns.label(stripes, (7, 7))[0] == ["fixed keys"]
    torch.testing.assert_close(patterns.similarity(stripes, (7, 7))["fixed keys"], torch.ones(1))
    assert patterns.label(torch.full((1, 49, 49), 1 / 49), (7, 7))[0] == ["uniform"]


def test_transposing_the_grid_swaps_rows_and_columns():
    grid = (3, 5)
    transposed = torch.arange(15).view(grid).T.flatten()
    maps = rows(torch.cat([patterns.templates(grid)["row"], patterns.templates(grid)["column"]]))
    names, _ = patterns.label(maps[:, transposed][:, :, transposed], (5, 3))
    assert names == ["column", "row"]


def test_similarity_is_the_cosine_of_flattened_maps():
    maps = attention(3, prefix=0).float()
    for name, masks in patterns.templates(GRID).items():
        wanted = torch.stack([F.cosine_similarity(maps.flatten(1), m.flatten()[None]) for m in masks]).amax(0)
        torch.testing.assert_close(patterns.similarity(maps, GRID)[name], wanted)


@pytest.mark.parametrize(("kind", "n"), [("conv", 49), ("conv", 120), ("conv", 5), ("mlp", 43), ("mlp", 16)])
def test_the_autoencoder_gives_maps_of_its_size_and_stays_below_a_million_parameters(kind, n):
    model = patterns.Autoencoder(n, kind=kind)
    drawn = model(torch.rand(2, n, n))
    assert drawn.shape == (2, n, n) and drawn.min() >= 0 and drawn.max() <= 1
    assert model.encode(torch.rand(2, n, n)).shape == (2, 32)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_an_autoencoder_of_dark_maps_does_not_die():
    """Sharp maps are nearly all zero; what it learns must be better than the mean map, and codes must differ."""
    maps = torch.stack([m for *_, m in planted((6, 6), 6, noise=0.0)]).mul(30).add(torch.randn(1, 36, 36)).softmax(-1)
    model, losses = patterns.fit(maps, batch=4, epochs=25)
    inputs = patterns.scaled(maps)
    assert losses[-1] < 0.9 * (inputs - inputs.mean(0)).square().mean()
    with torch.no_grad():
        codes = model.encode(inputs)
    spread = torch.linalg.svdvals(codes - codes.mean(0))
    assert spread[1] > 0.1 * spread[0]


def planted(grid, copies, noise):
    generator = torch.Generator().manual_seed(0)
    n = math.prod(grid)
    for which, (name, masks) in enumerate(patterns.templates(grid).items()):
        for _ in range(copies):
            yield which, name, rows(masks[0] / masks[0].max() + noise * torch.rand(n, n, generator=generator))


def purity(groups, truth):
    return sum(int(truth[groups == g].bincount().max()) for g in groups.unique()) / len(truth)


def test_codes_of_planted_patterns_fall_into_one_cluster_each():
    which, names, maps = zip(*planted((4, 4), 8, noise=0.1), strict=True)
    maps, truth = torch.stack(maps), torch.tensor(which)
    found = patterns.find(maps, (4, 4), clusters=len(set(which)))
    assert purity(found.clusters, truth) > 0.9
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert sum(a == b for a, b in zip(found.labels, names, strict=True)) > 0.9 * len(names)
    assert found.counts()["self"] == names.count("self")
    again = patterns.find(maps, (4, 4), clusters=len(set(which)))
    assert torch.equal(found.codes, again.codes) and torch.equal(found.clusters, again.clusters)
    torch.testing.assert_close(found.centres[0], maps[found.clusters == 0].mean(0))


def test_clusters_are_ordered_by_size_and_found_where_they_are():
    x = torch.cat([torch.randn(30, 5) + 20, torch.randn(50, 5), torch.randn(10, 5) - 20])
    groups = patterns.cluster(x, 3)
    assert groups.bincount().tolist() == [50, 30, 10]
    assert groups.tolist() == [1] * 30 + [0] * 50 + [2] * 10
    assert patterns.cluster(torch.zeros(4, 2), 3).tolist() == [0] * 4  # nothing to tell apart
    with pytest.raises(ValueError, match="count must be from 1 to the 4 rows"):
        patterns.cluster(torch.zeros(4, 2), 5)


def test_principal_places_keep_distances_of_what_lies_in_a_plane():
    x = torch.randn(20, 2) @ torch.linalg.qr(torch.randn(6, 2)).Q.T
    torch.testing.assert_close(torch.cdist(patterns.project(x), patterns.project(x)), torch.cdist(x, x))
    assert patterns.project(x[:1]).shape == (1, 2)
    with pytest.raises(ValueError, match="projection must be 'pca', 'tsne' or 'umap'"):
        patterns.project(x, "som")


def test_pooling_sums_keys_and_averages_queries_of_a_tile():
    maps = attention(2, prefix=0, grid=(4, 6)).float()
    pooled, small = patterns.pool(maps, (4, 6), largest=3)
    assert small == (3, 3) and pooled.shape == (2, 9, 9)
    torch.testing.assert_close(pooled.sum(-1), torch.ones(2, 9))
    halves, small = patterns.pool(maps[:, :16, :16].contiguous(), (4, 4), largest=2)
    wanted = maps[:, :16, :16].view(2, 2, 2, 2, 2, 2, 2, 2, 2).sum((6, 8)).mean((2, 4)).view(2, 4, 4)
    torch.testing.assert_close(halves, wanted)
    assert patterns.pool(maps, (4, 6))[0] is maps
