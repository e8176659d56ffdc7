"""Union of experts on pictures and long sequences: patches choose, and the networks learn with half of the experts."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from attnlab.models.language.union_classifier import UnionClassifier
from attnlab.models.vision.union_vit import UnionViT


def test_a_union_vit_learns_digits_with_half_of_its_experts():
    # Ten classes: chance is 0.1; after 100 steps, over three seeds, it is right in 0.80 to 0.82 of held-out digits.
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    model = UnionViT(dim=32, depth=2, heads=4, image=8, patch=2, in_channels=1, num_classes=10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 6e-3)
    for _ in range(100):
        picked = torch.randint(0, 1400, (64,))
        loss = F.cross_entropy(model(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (model.eval()(x[1400:]).argmax(-1) == y[1400:]).float().mean().item()
    assert right > 0.7


def test_it_takes_other_sizes_of_pictures_and_gives_its_map():
    model = UnionViT(dim=16, depth=2, heads=4, image=32, patch=8, num_classes=3).eval()
    x = torch.randn(2, 3, 48, 40)
    assert model(x).shape == (2, 3)
    assert model.forward_features(x)[0].shape == (2, 16, 6, 5)


def test_a_sequence_is_classified_alone_and_at_any_length():
    torch.manual_seed(0)
    model = UnionClassifier(vocabulary=20, length=32, classes=5, dim=16, heads=4, hidden=16).double().eval()
    ids = torch.randint(0, 20, (3, 32))
    torch.testing.assert_close(model(ids[1:2]), model(ids)[1:2])
    assert model(ids[:, :19]).shape == (3, 5)
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("ids", "error", "words"), [
    (torch.zeros(3, dtype=torch.long), ValueError, r"ids must have shape \(B, N\)"),
    (torch.zeros(1, 3), TypeError, "ids must be integers, got torch.float32"),
])  # fmt: skip
def test_bad_ids_are_named(ids, error, words):
    with pytest.raises(error, match=words):
        UnionClassifier()(ids)
