"""What Sparsifiner's predictor finds: the keys at which a teacher looks most, beside windows and chance.

    python benchmarks/sparsifiner_digits.py [--steps 500]

A small dense ViT learns scikit-learn's 8×8 digits, a pixel a patch. The predictors of a Sparsifiner of its weights then
learn its attention. Prints which share of each patch's most looked-at keys, a quarter of them all, each of three masks
of that size has (the predicted one, the nearest pixels, and a random one), the mean over blocks and heads, and the
accuracy with each in the teacher's place, without further training.
"""

from __future__ import annotations

import argparse
import math
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.models.vision.sparsifiner import Sparsifiner
from attnlab.models.vision.vit import ViT
from attnlab.nn.sparse.predicted import ConnectivityPredictor
from attnlab.recipes.sparsifiner import sparsifiner_losses, start_from, teach

NETWORK = {"dim": 48, "depth": 3, "heads": 3, "image": 8, "patch": 1, "in_channels": 1, "num_classes": 10}


def nearest(tokens: int, side: int) -> Tensor:
    """Scores (N − 1, N) that prefer the pixels close by; the class token is far."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
    far = torch.cdist(place.double(), place.double())
    return -F.pad(far, (1, 0), value=math.inf)[: tokens - 1].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the teacher; the predictors take as many")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels, train = torch.tensor(data.target), 1400
    teacher = ViT(**NETWORK)
    torch.nn.init.trunc_normal_(teacher.patches.weight, std=0.2)  # for short training
    torch.nn.init.trunc_normal_(teacher.positions.table, std=0.2)
    optimizer = torch.optim.AdamW(teacher.parameters(), 2e-3, weight_decay=0.02)
    for _ in range(options.steps):
        rows = torch.randint(0, train, (32,))
        loss = F.cross_entropy(teacher(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student = Sparsifiner(**NETWORK, reduce=4, predicted={"floor": 0.005})
    start_from(student, teacher.eval())
    optimizer = torch.optim.AdamW([p for n, p in student.named_parameters() if ".predictor." in n], 1e-2)
    for _ in range(options.steps):
        rows = torch.randint(0, train, (16,))
        taught = teach(teacher, images[rows], weights=True)
        losses = sparsifiner_losses(student.train().outputs(images[rows], raw=True), taught, labels[rows])
        optimizer.zero_grad()
        assert losses.approximation is not None
        losses.approximation.backward()
        optimizer.step()
    test, wanted = images[train:], labels[train:]
    tokens = student.positions.table.shape[0]
    keep = math.ceil(0.25 * tokens)
    local = nearest(tokens, 8)
    own = ConnectivityPredictor.choose
    with torch.inference_mode():
        accuracy = (teacher(test).argmax(1) == wanted).float().mean()
        print(f"teacher: accuracy {accuracy:.1%}")
        seen = teach(teacher, test[:64], weights=True).weights
        assert seen is not None
        best = torch.zeros_like(seen[..., 1:, :]).scatter(-1, seen[..., 1:, :].topk(keep).indices, 1.0)
        approximations = student.eval().outputs(test[:64]).approximations
        ways = {"predicted": lambda s: s, "nearest": lambda s: local.expand_as(s), "random": torch.rand_like}
        for name, score in ways.items():
            mask = torch.zeros_like(best).scatter(-1, score(approximations).topk(keep).indices, 1.0)
            recall = (mask * best).sum() / best.sum()

            def choose(self, found, alive=None, left=None, score=score):
                return own(self, score(found), alive, left)

            with mock.patch.object(ConnectivityPredictor, "choose", choose):
                accuracy = (student(test).argmax(1) == wanted).float().mean()
            print(f"{name:>10}: recall {recall:.1%}, accuracy {accuracy:.1%}", flush=True)


if __name__ == "__main__":
    main()
