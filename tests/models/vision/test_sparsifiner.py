"""Sparsifiner: the dense network when all is kept, dropped patches, its recipe, and what it learns of a teacher."""

import pytest
import torch
import torch.nn.functional as F

from attnlab.models.vision.sparsifiner import Sparsifiner
from attnlab.models.vision.vit import ViT
from attnlab.recipes.sparsifiner import sparsifiner_losses, start_from, teach

PLAIN = {"dim": 16, "depth": 3, "heads": 2, "image": 32, "patch": 8, "num_classes": 5}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def shaken(net: torch.nn.Module) -> torch.nn.Module:
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def test_equals_timms_deit_while_all_is_kept(timm):
    from attnlab.hub.official.vit import VisionTransformer

    theirs = shaken(
        timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5, qkv_bias=True
        )
    )
    net = Sparsifiner(**PLAIN, keep=1.0).eval()
    missing, unexpected = net.load_state_dict(VisionTransformer.rename(theirs.state_dict()), strict=False)
    assert not unexpected and all(".predictor." in name for name in missing)
    torch.testing.assert_close(net(X), theirs(X))


def test_dropped_patches_are_zeros_and_stay_dropped():
    net = shaken(Sparsifiner(**PLAIN, keep=0.5, drop_at=(0, 1), keep_tokens=(0.7, 0.4)))
    out = net.outputs(X)
    assert net.left == {0: 12, 1: 7} and (out.alive.sum(1) == 7).all()
    first = shaken(Sparsifiner(**PLAIN, keep=0.5, drop_at=(0,), keep_tokens=0.7))
    first.load_state_dict(net.state_dict())
    assert not (out.alive & ~first.outputs(X).alive).any()
    (found,) = net.forward_features(X)
    assert torch.equal(found.abs().sum(1).flatten(1) > 0, out.alive)
    # While the approximation is learned, nothing leaves.
    assert net.outputs(X, raw=True).alive is None


def test_training_gives_what_the_losses_need_and_evaluation_logits():
    teacher, net = shaken(ViT(**PLAIN)), Sparsifiner(**PLAIN, drop_at=(1,), keep_tokens=0.5)
    start_from(net, teacher)
    labels = torch.tensor([1, 3])
    raw, taught = net.train().outputs(X, raw=True), teach(teacher, X, weights=True)
    torch.testing.assert_close(raw.logits, taught.logits)  # whole attention, the teacher's weights
    losses = sparsifiner_losses(raw, taught, labels)
    assert losses.logits.item() == pytest.approx(0, abs=1e-5) and losses.tokens.item() == pytest.approx(0, abs=1e-9)
    rows = [(raw.approximations[i] - taught.weights[i, :, :, 1:]).pow(2).sum().item() for i in range(3)]
    assert losses.approximation.item() == pytest.approx(sum(rows) / 3, rel=1e-5)
    assert losses.total.item() == pytest.approx((losses.labels + 0.01 * losses.approximation).item(), rel=1e-4)
    out = net(X)
    losses = sparsifiner_losses(out, teach(teacher, X), labels)
    assert losses.approximation is None
    squares = [(out.tokens[b, i] - taught.tokens[b, i]).pow(2).mean() for b, i in out.alive.nonzero().tolist()]
    torch.testing.assert_close(losses.tokens, torch.stack(squares).mean())
    p, ours = taught.logits.softmax(-1), out.logits.log_softmax(-1)
    kl = (p * (p.log() - ours)).sum(-1).mean()
    torch.testing.assert_close(losses.logits, kl)
    wanted = F.cross_entropy(out.logits, labels) + 0.5 * kl + 0.5 * losses.tokens
    torch.testing.assert_close(losses.total, wanted)
    assert isinstance(net.eval()(X), torch.Tensor)


def test_learns_where_a_teacher_looks():
    """After a few steps of reconstruction the picked keys hold more of the teacher's attention than random ones."""
    torch.manual_seed(0)
    teacher = ViT(**PLAIN).eval()
    torch.nn.init.normal_(teacher.positions.table, std=1.0)
    for block in teacher.encoder.blocks:
        torch.nn.init.normal_(block.mixer.wqkv.weight, std=0.5)
    net = Sparsifiner(**PLAIN, reduce=2, keep=0.25)
    start_from(net, teacher)
    predictors = [p for n, p in net.named_parameters() if ".predictor." in n]
    optimizer = torch.optim.Adam(predictors, 0.02)
    for _ in range(60):
        images = torch.randn(8, 3, 32, 32)
        losses = sparsifiner_losses(
            net.train().outputs(images, raw=True), teach(teacher, images, weights=True), labels=torch.zeros(8).long()
        )
        optimizer.zero_grad()
        losses.approximation.backward()
        optimizer.step()
    images = torch.randn(16, 3, 32, 32)
    weights = teach(teacher, images, weights=True).weights[0, :, :, 1:]
    tokens = net.embed(images)[0]
    block = net.encoder.blocks[0]
    mask = block.mixer.eval().connect(block.norm1(tokens)).connectivity.mask[:, :, 1:]
    held = (weights * mask).sum(-1).mean().item()
    best = weights.topk(5).values.sum(-1).mean().item()
    assert held > 0.5 * (5 / 17 + best) > 5 / 17


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="keep must be one share or one for each of the 3 blocks"):
        Sparsifiner(**PLAIN, keep=(0.5, 0.5))
    with pytest.raises(ValueError, match="keep_tokens must be one share or one for each of drop_at"):
        Sparsifiner(**PLAIN, drop_at=(5,))
    with pytest.raises(ValueError, match=r"x must make the grid \(4, 4\)"):
        Sparsifiner(**PLAIN)(torch.randn(1, 3, 32, 40))
    with pytest.raises(ValueError, match="class_token must be True"):
        Sparsifiner(**PLAIN, class_token=False)
    with pytest.raises(ValueError, match="teacher must be a plain network"):
        start_from(Sparsifiner(**PLAIN), ViT(**{**PLAIN, "depth": 2}))
    taught = teach(ViT(**{**PLAIN, "image": 16}), X[:, :, :16, :16])
    with pytest.raises(ValueError, match="teacher must have the student's tokens"):
        sparsifiner_losses(Sparsifiner(**PLAIN).train()(X), taught, torch.tensor([0, 1]))
