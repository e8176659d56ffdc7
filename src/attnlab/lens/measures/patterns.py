"""Which patterns heads draw on the grid of patches: templates with names, an autoencoder, clusters (arXiv 2303.13731).

Maps are `(M, n, n)`: attention from patch to patch, n = rows·columns, without the class token. Each is one sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.lens.measures.spatial import hops

_NEIGHBOURS = (1, 2, 3)
NAMES = ("self", *(f"neighbour {k}" for k in _NEIGHBOURS), "row", "column", "fixed keys", "block", "uniform")


def templates(grid: tuple[int, int]) -> dict[str, Tensor]:
    """The fixed templates by name, each `(T, n, n)` with rows that sum to 1 as attention's; a name may have several.

    self: the diagonal. neighbour k: the square of k hops around the query. row, column: the query's own. block: the
    query's own tile, for each size of tile from 2 to half the grid. uniform: everything. (fixed keys is a family and no
    fixed template: see `similarity`.)
    """
    distance = hops(grid)
    rows, columns = (torch.arange(math.prod(grid)) // grid[1], torch.arange(math.prod(grid)) % grid[1])
    tiles = [
        (rows // size * grid[1] + columns // size)[:, None] == rows // size * grid[1] + columns // size
        for size in range(2, max(2, math.ceil(max(grid) / 2)) + 1)
    ]
    found = {
        "self": distance[None] == 0,
        **{f"neighbour {k}": (distance <= k)[None] for k in _NEIGHBOURS if k < max(grid) - 1},
        "row": (rows[:, None] == rows)[None],
        "column": (columns[:, None] == columns)[None],
        "block": torch.stack(tiles),
        "uniform": torch.ones_like(distance, dtype=torch.bool)[None],
    }
    return {name: mask / mask.sum(-1, keepdim=True) for name, mask in found.items()}


def similarity(maps: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Cosine of each map with each named template, `(M,)`; of a name with several, the best.

    fixed keys: all queries look at the same few keys, whatever they hold ("content independent", vertical stripes). The
    template has the m columns that receive most, for the best m ≤ max(1, n // 8), so its cosine with uniform attention
    stays small.
    """
    _check(maps, grid)
    norm = maps.flatten(1).norm(dim=1).clamp_min(torch.finfo(maps.dtype).tiny)
    found = {}
    for name, masks in templates(grid).items():
        masks = masks.to(maps)
        found[name] = ((maps.flatten(1) @ masks.flatten(1).mT) / masks.flatten(1).norm(dim=1)).amax(1) / norm
    most = maps.sum(-2).sort(-1, descending=True).values[:, : max(1, maps.shape[-1] // 8)].cumsum(-1)
    width = torch.arange(1, most.shape[-1] + 1, dtype=maps.dtype, device=maps.device)
    found["fixed keys"] = (most / (width * maps.shape[-1]).sqrt()).amax(-1) / norm
    return found


def label(maps: Tensor, grid: tuple[int, int]) -> tuple[list[str], Tensor]:
    """The name of the most similar template of each map, and the cosine `(M,)`."""
    found = similarity(maps, grid)
    best, which = torch.stack(list(found.values())).max(0)
    names = list(found)
    return [names[i] for i in which.tolist()], best


class Autoencoder(nn.Module):
    """Attention maps to a few numbers and back: `(M, n, n)` in [0, 1] → the same, through a code `(M, latent)`.

    kind="conv": three convolutions 3×3 with stride 2 to 16, 32, 64 channels and a linear map; back by a linear map and
    three times (2× nearest, convolution 3×3), cropped to the middle n×n, sigmoid. kind="mlp": n²–256–latent–256–n².
    Under a million parameters for n ≤ 120 (conv) or 43 (mlp): pool larger grids first (`pool`). The paper gives no
    sizes; these are ours.
    """

    def __init__(self, n: int, *, latent: int = 32, kind: str = "conv") -> None:
        super().__init__()
        if n < 2 or latent < 1:
            raise ValueError(f"n must be at least 2 and latent at least 1, got {n} and {latent}")
        self.n = n
        if kind == "mlp":
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(n * n, 256), nn.ReLU(), nn.Linear(256, latent))
            self.decoder = nn.Sequential(
                nn.Linear(latent, 256), nn.ReLU(), nn.Linear(256, n * n), nn.Unflatten(1, (1, n, n))
            )
            return
        if kind != "conv":
            raise ValueError(f"kind must be 'conv' or 'mlp', got {kind!r}")
        small = math.ceil(n / 8)
        down: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64)):
            down += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        up: list[nn.Module] = [nn.Linear(latent, 64 * small * small), nn.Unflatten(1, (64, small, small))]
        for before, after in ((64, 32), (32, 16), (16, 1)):
            up += [nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1)]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(64 * small * small, latent))
        self.decoder = nn.Sequential(*up)

    def encode(self, maps: Tensor) -> Tensor:
        return self.encoder(maps[:, None])

    @torch.no_grad()
    def start_from(self, brightness: float) -> None:
        """Let the last bias say how bright maps are in the mean.

        Maps are mostly dark: from a bias of zero, the first steps push the decoder down so far that no ReLU of it is
        ever on again, and all maps get the same code.
        """
        biases = [p for name, p in self.decoder.named_parameters() if name.endswith("bias")]
        biases[-1].fill_(math.log(brightness / (1 - brightness)))

    def forward(self, maps: Tensor) -> Tensor:
        drawn = self.decoder(self.encode(maps))[:, 0]
        start = (drawn.shape[-1] - self.n) // 2
        return drawn[:, start : start + self.n, start : start + self.n].sigmoid()


def scaled(maps: Tensor) -> Tensor:
    """Each map divided by its largest weight: what the autoencoder reads."""
    return maps / maps.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def fit(
    maps: Tensor,
    *,
    latent: int = 32,
    kind: str = "conv",
    epochs: int = 50,
    batch: int = 64,
    rate: float = 1e-3,
    seed: int = 0,
) -> tuple[Autoencoder, list[float]]:
    """An autoencoder trained on `maps`, and its mean squared error after each epoch (Adam)."""
    _check(maps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(maps.shape[-1], latent=latent, kind=kind).to(maps)
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    inputs, losses = scaled(maps.detach()), []
    model.start_from(min(max(float(inputs.mean()), 1e-4), 1 - 1e-4))
    for _ in range(epochs):
        total = 0.0
        for part in torch.randperm(len(inputs), generator=order).split(batch):
            wanted = inputs[part]
            with torch.enable_grad():
                loss = F.mse_loss(model(wanted), wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(part)
        losses.append(total / len(inputs))
    return model.eval(), losses


@dataclass(frozen=True, eq=False)
class Patterns:
    """Maps of heads in order: `codes (M, latent)`, `places (M, 2)`, `clusters (M,)`, and mean maps `centres (C, n, n)`.

    `labels` and `cosines (M,)` name each map's nearest template; `errors (M,)` say how well its code gives it back.
    """

    codes: Tensor
    places: Tensor
    clusters: Tensor
    centres: Tensor
    labels: list[str]
    cosines: Tensor
    errors: Tensor
    losses: list[float]

    def counts(self) -> dict[str, int]:
        """How many maps wear each label, the most frequent first."""
        return dict(sorted(((x, self.labels.count(x)) for x in set(self.labels)), key=lambda x: (-x[1], x[0])))


def find(
    maps: Tensor,
    grid: tuple[int, int],
    *,
    clusters: int = 6,
    projection: str = "pca",
    seed: int = 0,
    **training: object,
) -> Patterns:
    """Train an autoencoder on `maps (M, n, n)`, cluster the codes, lay them out in a plane, and name each map.

    Args:
        clusters: how many groups k-means makes; no more than there are maps.
        projection: "pca", "tsne" (scikit-learn) or "umap" (umap-learn).
        training: keywords of `fit`.
    """
    _check(maps, grid)
    if clusters < 1:
        raise ValueError(f"clusters must be at least 1, got {clusters}")
    model, losses = fit(maps, seed=seed, **training)  # type: ignore[arg-type]
    with torch.no_grad():
        inputs = scaled(maps)
        codes = model.encode(inputs)
        errors = (model(inputs) - inputs).square().mean((-2, -1))
    groups = cluster(codes, min(clusters, len(maps)), seed=seed)
    centres = torch.stack([maps[groups == g].mean(0) for g in range(int(groups.max()) + 1)])
    names, cosines = label(maps, grid)
    return Patterns(codes, project(codes, projection, seed=seed), groups, centres, names, cosines, errors, losses)


def cluster(x: Tensor, count: int, *, seed: int = 0, rounds: int = 50, tries: int = 8) -> Tensor:
    """k-means: the group `(M,)` of each row of `x (M, C)`, the largest group first; the best of several seeded starts.

    Starts as k-means++ (each new centre far from those before), and ends when nothing moves. Cost M·count·C a round.
    """
    if not 1 <= count <= len(x):
        raise ValueError(f"count must be from 1 to the {len(x)} rows, got {count}")
    generator = torch.Generator().manual_seed(seed)
    best = min((_lloyd(x, count, generator, rounds) for _ in range(tries)), key=lambda found: found[0])[1]
    _, groups = best.unique(return_inverse=True)
    return groups.bincount().argsort(descending=True, stable=True).argsort()[groups]


def _lloyd(x: Tensor, count: int, generator: torch.Generator, rounds: int) -> tuple[float, Tensor]:
    first = int(torch.randint(len(x), (1,), generator=generator))
    centres = x[first : first + 1]
    while len(centres) < count:
        far = torch.cdist(x, centres).amin(1).double().square().cpu()
        chosen = torch.multinomial(far if far.sum() > 0 else torch.ones_like(far), 1, generator=generator)
        centres = torch.cat((centres, x[chosen.to(x.device)]))
    groups = torch.cdist(x, centres).argmin(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, groups, x)
        sizes = groups.bincount(minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
        before, groups = groups, torch.cdist(x, centres).argmin(1)
        if torch.equal(before, groups):
            break
    return float(torch.cdist(x, centres).amin(1).square().sum()), groups


def project(codes: Tensor, method: str = "pca", *, seed: int = 0) -> Tensor:
    """Rows of `codes (M, C)` as places in a plane, `(M, 2)`: by PCA, or by t-SNE or UMAP where they are installed."""
    if method == "pca":
        centred = codes - codes.mean(0)
        _, _, axes = torch.linalg.svd(centred.double(), full_matrices=False)
        axes = F.pad(axes, (0, 0, 0, max(0, 2 - len(axes))))[:2]
        # A singular vector's sign is arbitrary: its largest entry is made positive.
        axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
        return (centred.double() @ axes.mT).to(codes.dtype)
    if method == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise ImportError("projection 'tsne' needs scikit-learn: pip install 'attnlab[data]'") from None
        near = max(1.0, min(30.0, (len(codes) - 1) / 3))
        placed = TSNE(2, perplexity=near, random_state=seed, init="pca").fit_transform(codes.double().cpu().numpy())
        return torch.as_tensor(placed).to(codes)
    if method == "umap":
        try:
            import umap
        except ImportError:
            raise ImportError("projection 'umap' needs umap-learn: pip install umap-learn") from None
        return torch.as_tensor(umap.UMAP(random_state=seed).fit_transform(codes.double().cpu().numpy())).to(codes)
    raise ValueError(f"projection must be 'pca', 'tsne' or 'umap', got {method!r}")


def pool(maps: Tensor, grid: tuple[int, int], largest: int = 8) -> tuple[Tensor, tuple[int, int]]:
    """Maps between tiles of patches instead of patches, on a grid of at most `largest` a side, and that grid.

    `(M, n, n)` → `(M, t, t)`: what the keys of a tile receive together, mean over the queries of a tile. Rows that sum
    to 1 still do. Tiles differ by a patch where the sides do not divide.
    """
    _check(maps, grid)
    small = (min(grid[0], largest), min(grid[1], largest))
    if small == tuple(grid):
        return maps, small
    rows, columns = (torch.arange(full) * few // full for full, few in zip(grid, small, strict=True))
    tile = (rows[:, None] * small[1] + columns).flatten().to(maps.device)
    member = F.one_hot(tile, math.prod(small)).to(maps)  # (n, t)
    return (member / member.sum(0)).mT @ maps @ member, small


def _check(maps: Tensor, grid: tuple[int, int] | None = None) -> None:
    if maps.ndim != 3 or maps.shape[-1] != maps.shape[-2] or not len(maps):
        raise ValueError(f"maps must be (M, n, n) with at least one map, got {tuple(maps.shape)}")
    if not maps.is_floating_point():
        raise TypeError(f"maps must be floating point, got {maps.dtype}")
    if grid is not None and math.prod(grid) != maps.shape[-1]:
        raise ValueError(f"grid {tuple(grid)} has {math.prod(grid)} patches, but maps have {maps.shape[-1]} tokens")
