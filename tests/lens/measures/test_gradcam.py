"""The matcher's map, its heat and the mask: against a plain transcription, and what must hold of any."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.lens.measures.gradcam import attention_gradcam, heat_map, keep_hottest


def test_equals_a_loop_over_heads_and_inner_tokens() -> None:
    attention = torch.rand(2, 3, 6, 4, dtype=torch.float64)
    gradient = torch.randn_like(attention)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    wanted = torch.zeros(2, 4, dtype=torch.float64)
    for b, n in ((0, 4), (1, 2)):
        for t in range(1, n + 1):
            for h in range(3):
                wanted[b] += attention[b, h, t] * gradient[b, h, t].clamp(min=0) / 3 / n
    torch.testing.assert_close(attention_gradcam(attention, gradient, mask), wanted)


def test_padding_and_the_two_special_tokens_do_not_count() -> None:
    attention, gradient = torch.rand(1, 2, 5, 9), torch.rand(1, 2, 5, 9)
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    found = attention_gradcam(attention, gradient, mask)
    attention[:, :, [0, 3, 4]] = 7.0
    assert torch.equal(attention_gradcam(attention, gradient, mask), found)


def test_heat_is_resized_and_blurred_as_skimage_and_scipy_do() -> None:
    transform = pytest.importorskip("skimage.transform")
    filters = pytest.importorskip("scipy.ndimage")
    relevance = torch.rand(6, 5, dtype=torch.float64)
    unit = ((relevance - relevance.min()) / (relevance.max() - relevance.min())).numpy()
    wanted = filters.gaussian_filter(transform.resize(unit, (48, 40), order=3, mode="constant"), 0.02 * 48)
    wanted = (wanted - wanted.min()) / (wanted - wanted.min()).max()
    np.testing.assert_allclose(heat_map(relevance, (48, 40)).numpy(), wanted, atol=1e-12)


def test_a_constant_map_has_no_heat() -> None:
    assert not heat_map(torch.full((4, 4), 3.0), (32, 32)).any()


@pytest.mark.parametrize("similarity", [-0.4, 0.0, 0.36, 1.0])
def test_the_fraction_kept_falls_with_similarity(similarity: float) -> None:
    heat = torch.rand(100, 100, dtype=torch.float64)
    share = float(keep_hottest(heat, similarity).double().mean())
    assert abs(share - min(1 - similarity / 2, 1.0)) < 1e-3
    assert heat[keep_hottest(heat, 1.0)].min() > heat[~keep_hottest(heat, 1.0)].max()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="alike"):
        attention_gradcam(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 5))
    with pytest.raises(ValueError, match="text_mask"):
        attention_gradcam(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="between its first and its last"):
        attention_gradcam(torch.rand(1, 2, 2, 4), torch.rand(1, 2, 2, 4))
    with pytest.raises(ValueError, match=r"\(h, w\)"):
        heat_map(torch.rand(9), (3, 3))
