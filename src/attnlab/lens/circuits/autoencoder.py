"""The circuit of a task from a few prompts and no ablation: a dictionary of what heads say, and who says it when."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cards import LENS, Card, register


@register(
    Card(
        name="head_codes",
        title="Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models",
        paper="2405.12522",
        system="sae_circuits",
        family="circuits",
        kind=LENS,
        cost="2·F·C multiplications per head and prompt",
    )
)
class SparseAutoencoder(nn.Module):
    """Writes what a head adds to the stream as a few of `features` directions: `(…, C)` → itself, `(…, features)`.

        f = relu(We (x − b) + be)        x̂ = Wd f + b        We (F, C), Wd (C, F), all rows of length one

    The largest feature is the head's code: one whole number for a head and a prompt. The rows of Wd, not the features'
    columns, have unit length, as in the authors' code. 2 F·C + F + C parameters. Source: arXiv 2405.12522.

    The way to a circuit: `head_contributions` of prompts that use it and of prompts that cannot, `fit_autoencoder` on
    ten of them, `codes`, then `node_scores` or `edge_scores`.
    """

    def __init__(self, dim: int, features: int = 200, *, seed: int | None = None) -> None:
        super().__init__()
        if dim < 1 or features < 1:
            raise ValueError(f"dim and features must be at least 1, got {dim} and {features}")
        rng = torch.Generator()
        rng.manual_seed(seed) if seed is not None else rng.seed()
        self.encoder = nn.Parameter(torch.randn(features, dim, generator=rng))
        self.encoder_bias = nn.Parameter((2 * torch.rand(features, generator=rng) - 1) * dim**-0.5)
        self.decoder = nn.Parameter(torch.randn(dim, features, generator=rng))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.normalise_()

    @torch.no_grad()
    def normalise_(self) -> None:
        """Give the rows of both matrices unit length: what they compute stays, and gradients keep their scale."""
        for weight in (self.encoder, self.decoder):
            weight.copy_(F.normalize(weight, dim=-1))

    def encode(self, x: Tensor) -> Tensor:
        # A gradient through the normalisation is orthogonal to each row.
        return F.linear(x - self.bias, F.normalize(self.encoder, dim=-1), self.encoder_bias).relu()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.encode(x)
        return F.linear(f, F.normalize(self.decoder, dim=-1), self.bias), f

    def loss(self, x: Tensor, sparsity: float = 0.02) -> Tensor:
        """Mean squared error over all entries, and `sparsity` times the mean over heads and prompts of ‖f‖₁."""
        rebuilt, f = self(x)
        return F.mse_loss(rebuilt, x) + sparsity * f.abs().sum(-1).mean()

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The number of the largest feature, `(…)`, the first of equals: of a head that says nothing it is 0."""
        return self.encode(x).argmax(-1)


def fit_autoencoder(
    heads: Tensor,
    *,
    features: int = 200,
    examples: int = 10,
    epochs: int = 500,
    sparsity: float = 0.02,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> SparseAutoencoder:
    """Trains on `examples` random prompts of `heads (B, M, C)`, positive and negative ones mixed, all heads together.

    Adam over the whole of them at each epoch: seconds. sparsity: 0.02, for the docstring task 0.05.
    """
    if heads.dim() != 3:
        raise ValueError(f"heads must have shape (B, layers · heads, C), got {tuple(heads.shape)}")
    rng = torch.Generator().manual_seed(seed)
    chosen = heads[torch.randperm(len(heads), generator=rng)[:examples].to(heads.device)].detach()
    model = SparseAutoencoder(heads.shape[-1], features, seed=seed).to(chosen)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(epochs):
        train_step(model, optimizer, chosen, sparsity)
    return model


def train_step(model: SparseAutoencoder, optimizer: torch.optim.Optimizer, x: Tensor, sparsity: float) -> None:
    """One step: from rows of unit length, along them."""
    model.normalise_()
    optimizer.zero_grad()
    model.loss(x, sparsity).backward()
    optimizer.step()


def unique_codes(codes: Tensor, others: Tensor, *, normalise: bool = False) -> Tensor:
    """How many codes each head has in `codes (B, M)` and never in `others (B′, M)`: `(M,)`.

    `normalise` divides by how many it has in either.
    """
    counts = []
    for own, other in zip(_sets(codes), _sets(others), strict=True):
        counts.append(len(own - other) / (len(own | other) if normalise else 1))
    return torch.tensor(counts, dtype=torch.float64)


def node_scores(
    positive: Tensor,
    negative: Tensor,
    *,
    layers: int | None = None,
    normalise: bool = False,
) -> Tensor:
    """`(M,)`, summing to one: how much each head is of the circuit, by its codes `(N, M)` in the two sets of prompts.

    The softmax over all heads of the numbers of codes that are found in positive prompts alone; with `layers`, over the
    layers of each column of heads instead.
    """
    unique = unique_codes(positive, negative, normalise=normalise)
    if layers is None:
        return unique.softmax(0)
    return unique.view(layers, -1).softmax(0).flatten()


def unique_pairs(positive: Tensor, negative: Tensor, *, normalise: bool = False) -> Tensor:
    """`(M, M)`: how many pairs of codes two heads have together in a positive prompt and in no negative one.

    Zero on the diagonal. `normalise` divides by how many pairs they have in positive prompts and in negative ones, a
    pair in both counting twice.
    """
    size = int(max(positive.max(), negative.max())) + 1
    heads = positive.shape[1]
    counts = torch.zeros(heads, heads, dtype=torch.float64)
    for i in range(heads):
        for j in range(i + 1, heads):
            own, other = (set((c[:, i] * size + c[:, j]).tolist()) for c in (positive, negative))
            counts[i, j] = len(own - other) / ((len(own) + len(other)) if normalise else 1)
    return counts + counts.T


def edge_scores(positive: Tensor, negative: Tensor, *, normalise: bool = False, listed: int | None = None) -> Tensor:
    """`(M,)`, summing to one: how often each head stands in the pairs with the most codes of their own.

    Pairs are ranked by `unique_pairs`, and both heads of each are written to a list; of its first `listed` (M²/2)
    entries each gives its head one; then a softmax.
    """
    pairs = unique_pairs(positive, negative, normalise=normalise)
    heads = len(pairs)
    order = pairs.flatten().sort(descending=True, stable=True).indices
    entries = torch.stack((order // heads, order % heads), 1).flatten()
    taken = entries[: heads**2 // 2 if listed is None else listed]
    return torch.bincount(taken, minlength=heads).double().softmax(0)


def roc_curve(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False positive rates, true positive rates and thresholds, from (0, 0) to (1, 1), equal scores at one point."""
    scores, truth = scores.flatten().double(), truth.flatten().bool()
    if scores.shape != truth.shape or truth.all() or not truth.any():
        raise ValueError(
            f"truth must say of each of {len(scores)} heads whether it is in the circuit, some yes and some no"
        )
    thresholds = scores.unique(sorted=True).flip(0)
    above = scores >= thresholds[:, None]
    tpr = (above & truth).sum(1) / truth.sum()
    fpr = (above & ~truth).sum(1) / (~truth).sum()
    start = torch.zeros(1)
    return torch.cat((start, fpr)), torch.cat((start, tpr)), torch.cat((torch.full((1,), torch.inf), thresholds))


def roc_auc(scores: Tensor, truth: Tensor) -> float:
    """The area under `roc_curve`: how likely a head of the circuit scores above one that is not in it."""
    fpr, tpr, _ = roc_curve(scores, truth)
    return torch.trapezoid(tpr.double(), fpr.double()).item()


def best_f1(scores: Tensor, truth: Tensor, *, variant: Literal["paper", "release"] = "paper") -> float:
    """The best over all thresholds of the harmonic mean of precision and recall.

    "release" is what the authors' code calls F1: the harmonic mean of recall and 1 − fpr.
    """
    fpr, tpr, thresholds = roc_curve(scores, truth)
    if variant == "release":
        other = 1 - fpr
    else:
        truth = truth.flatten().bool()
        above = scores.flatten().double() >= thresholds[:, None]
        other = (above & truth).sum(1) / above.sum(1).clamp_min(1)
    return (2 * tpr * other / (tpr + other).clamp_min(1e-12)).max().item()


def _sets(codes: Tensor) -> list[set[int]]:
    return [set(column.tolist()) for column in codes.T]
