"""SOFT: the equations, Newton's inverse and its gradient, the symmetric positive matrix, landmarks, linear cost."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.cost import count_flops
from attnlab.nn.linear.soft import SoftAttention, gaussian, newton_inverse, normalised_inverse

D = torch.float64


def kernel(points: int = 6, width: int = 3) -> torch.Tensor:
    q = 2 * torch.randn(2, points, width, dtype=D)
    return gaussian(q, q)


def by_hand(module: SoftAttention, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Head by head, pair by pair, from the paper's equations, with a solver for the inverse."""
    (height, width), d, r = grid, module.head_dim, module.ratio
    q_rows, v_rows = module.wqv(x).chunk(2, -1)
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for h in range(module.heads):
            of = slice(h * d, (h + 1) * d)
            q, v = q_rows[b, :, of] / d**0.25, v_rows[b, :, of]
            marks = F.conv2d(q.T.reshape(1, d, height, width), module.landmarks.weight, stride=r)[0].flatten(1).T
            marks = F.gelu(F.layer_norm(marks, (d,), module.norm.weight, module.norm.bias))
            outer, among = (torch.exp(-(torch.cdist(a, marks) ** 2) / 2) for a in (q, marks))
            middle = torch.linalg.inv(among + 0.01 * torch.eye(len(marks), dtype=D))
            if module.normalize:
                scale = torch.diag(among.sum(1) ** -0.5)
                middle = scale @ torch.linalg.inv(among) @ scale
            maps = v.T.reshape(d, 1, height, width)
            near = F.conv2d(maps, module.conv.weight[h : h + 1], padding=module.conv.padding[0])
            out[b, :, of] = outer @ middle @ outer.T @ v + near.flatten(1).T
    return module.wo(out)


@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_equations(normalize):
    module = SoftAttention(12, heads=2, ratio=2, normalize=normalize, iterations=40).to(D)
    x = torch.randn(2, 24, 12, dtype=D)
    torch.testing.assert_close(module(x, grid=(4, 6)), by_hand(module, x, (4, 6)), rtol=1e-5, atol=1e-6)


def test_newtons_iteration_ends_at_the_inverse():
    k = kernel()
    torch.testing.assert_close(newton_inverse(k), torch.linalg.inv(k + 0.01 * torch.eye(6, dtype=D)))
    scale = k.sum(-1).rsqrt()
    wanted = scale[..., None] * torch.linalg.inv(k) * scale[..., None, :]
    for variant in ("paper", "release"):
        torch.testing.assert_close(normalised_inverse(k, iterations=40, variant=variant), wanted)


def test_the_gradient_is_that_of_an_inverse():
    k = kernel(4, 3).requires_grad_()
    weight = torch.randn(2, 4, 4, dtype=D)
    ours = torch.autograd.grad((newton_inverse(k) * weight).sum(), k)[0]
    exact = torch.autograd.grad((torch.linalg.inv(k + 0.01 * torch.eye(4, dtype=D)) * weight).sum(), k)[0]
    torch.testing.assert_close(ours, exact)
    both = [torch.autograd.grad((normalised_inverse(k, iterations=40, variant=v) * weight).sum(), k)[0]
            for v in ("paper", "release")]  # fmt: skip
    torch.testing.assert_close(*both)


def test_with_every_token_a_landmark_nothing_is_approximated():
    q = torch.randn(1, 10, 4, dtype=D)
    whole = gaussian(q, q)
    torch.testing.assert_close(whole @ newton_inverse(whole, ridge=0.0, iterations=60) @ whole, whole)


def test_more_landmarks_come_closer():
    q = torch.randn(1, 64, 4, dtype=D)
    whole, errors = gaussian(q, q), []
    for m in (4, 16, 48):
        outer = gaussian(q, q[:, :m])
        errors.append((outer @ newton_inverse(outer[:, :m]) @ outer.mT - whole).norm().item())
    assert errors[2] < errors[1] < errors[0]


def test_the_matrix_is_symmetric_and_positive():
    module, x = SoftAttention(8, heads=2).to(D), torch.randn(1, 24, 8, dtype=D)
    matrix = module.weights(x, grid=(4, 6))
    torch.testing.assert_close(matrix, matrix.mT)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9


def test_the_kernel_knows_only_differences():
    q = torch.randn(2, 5, 3, dtype=D)
    torch.testing.assert_close(gaussian(q + 3, q + 3), gaussian(q, q))


def test_a_sample_does_not_depend_on_others_unless_as_released():
    x = torch.cat((torch.randn(1, 16, 8, dtype=D), 9 * torch.randn(1, 16, 8, dtype=D)))
    for variant, alone in (("paper", True), ("release", False)):
        torch.manual_seed(0)
        module = SoftAttention(8, heads=2, normalize=True, iterations=3, variant=variant).to(D)
        same = torch.allclose(module(x, grid=(4, 4))[:1], module(x[:1], grid=(4, 4)), rtol=1e-12, atol=1e-12)
        assert same is alone


def test_as_many_landmarks_for_a_larger_map_cost_linearly():
    def flops(side: int, ratio: int) -> int:
        module = SoftAttention(16, heads=1, ratio=ratio)
        with torch.no_grad():
            return count_flops(module, torch.randn(1, side * side, 16), grid=(side, side))

    assert flops(32, 8) < 4.01 * flops(16, 4)


def test_bad_arguments_are_named():
    for message, options in (
        ("ratio must be at least 1, got 0", {"ratio": 0}),
        ("kernel must be odd, or 0 for none, got 4", {"kernel": 4}),
        ("variant must be 'paper' or 'release', got 'code'", {"variant": "code"}),
        ("causal must be False", {"causal": True}),
    ):
        with pytest.raises(ValueError, match=message):
            SoftAttention(8, heads=2, **options)
    with pytest.raises(ValueError, match="matrix must be square"):
        newton_inverse(torch.ones(2, 3))
