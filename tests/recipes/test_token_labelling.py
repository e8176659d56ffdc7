"""Token labelling: the loss by hand, and boxes that swap and swap back."""

import pytest
import torch

from attnlab.recipes.token_labelling import random_box, swap_box, token_label_loss


def entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(4, 5), torch.randn(4, 9, 5), torch.rand(4, 5, 11).softmax(1)


def test_is_the_weighted_sum_of_two_soft_cross_entropies() -> None:
    whole, places, targets = batch()
    wanted = 2 * entropy(whole, targets[..., 1]) + 3 * entropy(places, targets[..., 2:].transpose(1, 2))
    torch.testing.assert_close(token_label_loss(whole, places, targets, class_weight=2, dense_weight=3), wanted)


def test_the_class_label_is_mixed_by_the_area_of_the_box() -> None:
    whole, places, targets = batch()
    mixed = (1 - 4 / 9) * targets[..., 1] + 4 / 9 * targets[..., 1].flip(0)
    found = token_label_loss(whole, places, targets, box=(0, 1, 2, 3), dense_weight=0)
    torch.testing.assert_close(found, entropy(whole, mixed))


def test_one_label_for_all_stands_for_every_token() -> None:
    whole, places, targets = batch()
    label = targets[..., 0]
    repeated = label.unsqueeze(-1).expand(-1, -1, 11)
    torch.testing.assert_close(token_label_loss(whole, places, label), token_label_loss(whole, places, repeated))


def test_ground_truth_is_blended_in_by_agreement() -> None:
    whole, places, _ = batch()
    targets = torch.zeros(4, 5, 11)
    targets[:, 0, 0] = 1
    targets[:2, 0, 1], targets[2:, 3, 1] = 1, 1
    label = torch.zeros(4, 5)
    label[:2, 0] = 1
    label[2:, 3], label[2:, 0] = 0.9, 0.1
    found = token_label_loss(whole, places, targets, ground_truth=True, dense_weight=0)
    torch.testing.assert_close(found, entropy(whole, label))


def test_swapping_a_box_twice_gives_the_maps_back() -> None:
    maps, box = torch.randn(4, 5, 6, 2), (1, 2, 4, 6)
    swapped = swap_box(maps, box)
    assert torch.equal(swapped[:, 1:4, 2:6], maps.flip(0)[:, 1:4, 2:6])
    assert torch.equal(swapped[:, 0], maps[:, 0])
    assert torch.equal(swap_box(swapped, box), maps)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_boxes_lie_in_the_grid_and_cover_what_beta_says(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(400):
        top, left, bottom, right = random_box((20, 30), beta=beta, generator=generator)
        assert 0 <= top <= bottom <= 20
        assert 0 <= left <= right <= 30
        shares.append((bottom - top) * (right - left) / 600)
    # Half of the grid in the mean, less what is clipped at the edges: between a quarter and a half.
    assert 0.25 < sum(shares) / 400 < 0.5


def test_bad_targets_are_named() -> None:
    whole, places, targets = batch()
    with pytest.raises(ValueError, match="targets"):
        token_label_loss(whole, places, targets[..., :-1])
