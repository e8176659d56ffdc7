"""Routing attention: the oracle goes through clusters and their members one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.cost import count_flops
from attnlab.nn.multihead import MultiHead
from attnlab.nn.sparse.cluster_routing import ClusterRouting, OnlineMeans, cluster_attention
from attnlab.patterns import Halo


def oracle(m: ClusterRouting, x: Tensor) -> Tensor:
    """The equations of the paper's variant for x (N, C), one query at a time."""
    n, d, heads = len(x), m.head_dim, []
    q, k, v = (x @ m.wqkv.weight.T).split([h * d for h in (m.heads, m.key_heads, m.heads)], -1)
    for h in range(m.heads):
        qh, vh = (t[:, h * d : (h + 1) * d] for t in (q, v))
        kh = None if h >= m.key_heads else k[:, h * d : (h + 1) * d]
        out = torch.zeros(n, d, dtype=x.dtype)
        if h < m.local_heads:
            for i in range(n):
                first = max(i // m.window - 1, 0) * m.window
                last = i + 1 if m.causal else (i // m.window + 2) * m.window
                out[i] = torch.softmax(qh[i] @ kh[first:last].T / d**0.5, -1) @ vh[first:last]
            heads.append(out)
            continue
        qh = F.layer_norm(qh, (d,))
        kh = qh if kh is None else F.layer_norm(kh, (d,))
        times = torch.zeros(n)
        for c, mean in enumerate(m.means.means[h - m.local_heads]):
            size = -(-n // m.clusters) if m.size is None else m.size
            queries = sorted(range(n), key=lambda i: -float(qh[i] @ mean))[:size]
            keys = sorted(range(n), key=lambda i: -float(kh[i] @ mean))[:size]
            for i in queries:
                seen = [j for j in keys if j <= i or not m.causal]
                ks, vs = kh[seen], vh[seen]
                if m.memory is not None:
                    ks, vs = (torch.cat((t[h - m.local_heads, c], s)) for t, s in zip(m.memory, (ks, vs), strict=True))
                out[i] += torch.softmax(qh[i] @ ks.T / d**0.5, -1) @ vs
                times[i] += 1
        heads.append(out / times.clamp_min(1)[:, None])
    return torch.cat(heads, -1) @ m.wo.weight.T


@pytest.mark.parametrize(
    "options",
    [
        dict(clusters=4),
        dict(clusters=3, size=5, memory=2),
        dict(clusters=3, size=5, causal=True),
        dict(clusters=3, causal=True, shared=False, memory=1),
        dict(clusters=3, causal=True, memory=1, local_heads=0),
        dict(clusters=2, size=40, local_heads=3),
    ],
    ids=str,
)
def test_equals_the_equations(options: dict) -> None:
    torch.manual_seed(0)
    m = ClusterRouting(8, heads=4, window=3, **options).double().eval()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(m(x), torch.stack([oracle(m, t) for t in x]))


def test_one_cluster_of_all_tokens_is_full_attention() -> None:
    torch.manual_seed(0)
    m = ClusterRouting(8, heads=2, clusters=1, local_heads=0, variant="release").double().eval()
    plain = MultiHead(8, heads=2).double()
    plain.load_state_dict({n: p for n, p in m.state_dict().items() if n.split(".")[0] in ("wqkv", "wo")})
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(m(x) * (1 + 1e-5), plain(x))


def test_a_token_sees_nothing_later_in_given_clusters() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 10, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    members = torch.stack([torch.randperm(10)[:6].sort().values for _ in range(6)]).view(1, 2, 3, 6)
    for options in (dict(), dict(own_last=True), dict(memory=(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4)))):
        out = cluster_attention(q, k, v, members, members, causal=True, **options)
        for i in range(10):
            for gradient in torch.autograd.grad(out[:, :, i].sum(), (k, v), retain_graph=True):
                assert not gradient[:, :, i + 1 :].any()


def test_a_token_in_no_cluster_gets_zeros() -> None:
    q = torch.randn(1, 1, 6, 4)
    members = torch.tensor([[[[0, 2], [2, 5]]]])
    out = cluster_attention(q, q, q, members, members)
    assert not out[0, 0, [1, 3, 4]].any() and out[0, 0, [0, 2, 5]].all()


def test_the_order_of_the_clusters_is_nothing() -> None:
    m = ClusterRouting(8, heads=4, clusters=5, size=4).double().eval()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    before = m(x)
    m.means.means.copy_(m.means.means.flip(1))
    torch.testing.assert_close(m(x), before)


def test_the_choice_sees_later_tokens_and_causal_is_not_claimed() -> None:
    torch.manual_seed(0)
    m = ClusterRouting(8, heads=2, clusters=4, local_heads=0, causal=True).double().eval()
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    changed = torch.cat((x[:, :12], torch.randn(1, 4, 8, dtype=torch.float64)), 1)
    assert not torch.allclose(m(x)[:, :12], m(changed)[:, :12])


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_training_moves_the_means_as_the_rule_says(variant: str) -> None:
    torch.manual_seed(0)
    m = ClusterRouting(8, heads=1, clusters=20, local_heads=0, decay=0.9, variant=variant).double()
    m.means.start(torch.randn(1, 1, 50, 8, dtype=torch.float64))
    x, old = torch.randn(2, 7, 8, dtype=torch.float64), m.means.means.clone()
    q, k, _ = (x @ m.wqkv.weight.T).chunk(3, -1)
    tokens = torch.cat((q, k), 1).flatten(0, 1)
    tokens = F.normalize(tokens, dim=-1) if variant == "release" else F.layer_norm(tokens, (8,))
    nearest = (tokens @ old[0].T).argmax(-1)
    assert len(nearest.unique()) < 20  # some means have no token
    wanted = old[0].clone()
    for c in nearest.unique():
        total = tokens[nearest == c].sum(0)
        new = F.normalize(total, dim=0) if variant == "release" else total / (nearest == c).sum()
        wanted[c] = 0.9 * wanted[c] + 0.1 * new
    m(x).sum().backward()
    torch.testing.assert_close(m.means.means[0], wanted)
    torch.testing.assert_close(m.commitment_loss, 1e-4 * (tokens - old[0][nearest]).pow(2).mean())
    m.eval()(x)
    torch.testing.assert_close(m.means.means[0], wanted)


def test_the_first_batch_in_training_starts_the_means_once() -> None:
    torch.manual_seed(0)
    m = ClusterRouting(8, heads=2, clusters=3)
    random = m.means.means.clone()
    m(torch.randn(2, 20, 8))
    assert m.means.started and (m.means.means - random).abs().max() > 0.1
    other = ClusterRouting(8, heads=2, clusters=3)
    other.load_state_dict(m.state_dict())
    other(torch.randn(2, 20, 8))
    assert (other.means.means - m.means.means).abs().max() < 0.05


def test_k_means_recovers_clusters_that_are_there() -> None:
    torch.manual_seed(0)
    kind = torch.arange(60) % 3
    x = F.normalize(5 * torch.eye(3)[kind] + 0.3 * torch.randn(1, 1, 60, 3), dim=-1)
    means = OnlineMeans(1, 3, 3)
    # From one token of each kind: k-means from three tokens of one kind may well end elsewhere.
    means.means.copy_(x[:, 0, :3])
    for _ in range(5):
        means.means.copy_(means.one_round(x, means.means))
    for c, members in enumerate(means.members(x, 20)[0, 0]):
        assert (kind[members] == c).all()


def test_costs_the_clusters_and_not_the_square() -> None:
    q = torch.randn(1, 2, 64, 8)
    members = torch.arange(64).view(1, 1, 8, 8).expand(1, 2, -1, -1)
    with torch.no_grad():
        found = count_flops(lambda: cluster_attention(q, q, q, members, members))
    assert found == 2 * 4 * 8 * 8**2 * 8


class Windowed(nn.Module):
    """Multi-head attention within each token's block and the blocks beside it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = MultiHead(dim, heads=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, pattern=Halo((x.shape[1],), 8, 8))


def test_copies_from_a_token_of_its_kind_where_a_window_cannot() -> None:
    """Each of 32 kinds comes twice, 32 tokens apart; the first shows a digit, which the second is asked for."""
    accuracy = {}
    for name in ("routed", "window"):
        torch.manual_seed(0)
        kinds, digits = F.normalize(torch.randn(32, 32), dim=-1) * 4, torch.randn(8, 32)
        layer = ClusterRouting(32, heads=2, clusters=8, size=16, local_heads=0) if name == "routed" else Windowed(32)
        head = nn.Linear(32, 8)
        optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 1e-2)
        for step in range(121):
            order, value = torch.rand(32, 32).argsort(1), torch.randint(8, (32, 32))
            x = torch.cat((kinds[order] + digits[value], kinds[order]), 1)
            logits = head(layer(x))[:, 32:]
            if step == 120:
                accuracy[name] = (logits.argmax(-1) == value).float().mean().item()
                break
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), value.flatten()).backward()
            optimizer.step()
    assert accuracy["routed"] > 0.6
    assert accuracy["window"] < 0.2  # one in eight by chance


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="local_heads"):
        ClusterRouting(8, heads=2, local_heads=2)
    with pytest.raises(ValueError, match="memory"):
        ClusterRouting(8, heads=2, causal=True, shared=False)
    with pytest.raises(ValueError, match="variant"):
        ClusterRouting(8, heads=2, variant="official")
    with pytest.raises(ValueError, match="clusters"):
        ClusterRouting(8, heads=2, clusters=0)
    with pytest.raises(ValueError, match="context"):
        ClusterRouting(8, heads=2)(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
