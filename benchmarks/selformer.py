"""Does reading molecules first help to learn a property from few of them? And do SELFIES read better than SMILES?

    python benchmarks/selformer.py [--steps 300] [--labelled 60]

A small SELFormer guesses masked tokens of generated molecules, then learns how much a molecule weighs from a few of
them; the same network starts untrained for comparison. Both again on the same molecules as SMILES.
"""

from __future__ import annotations

import argparse
import importlib

import torch
from torch import Tensor

from attnlab.models.language.bpe import ByteTokenizer
from attnlab.models.language.molecules import random_selfies, symbols
from attnlab.models.language.selformer import Selformer
from attnlab.recipes.minilm import warm_then_decay
from attnlab.recipes.selformer import mask_tokens, masked_loss, property_loss, train

TUNING = 100
WEIGHTS = {"F": 19.0, "Cl": 35.5, "O": 16.0, "N": 14.0, "S": 32.1, "C": 12.0}


def weight(molecule: str) -> float:
    """Of the atoms that are written, hydrogen aside; the symbols that count atoms are none."""
    total, counts = 0.0, False
    for symbol in symbols(molecule):
        atom = symbol.strip("[]=#")
        total += 0.0 if counts else WEIGHTS.get(atom, 0.0)
        counts = "Ring" in symbol or ("Branch" in symbol and not counts)
    return total


def entropy(ids: Tensor) -> float:
    shares = torch.bincount(ids).double()
    shares = shares[shares > 0] / shares.sum()
    return -(shares * shares.log()).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--labelled", type=int, default=60)
    given = parser.parse_args()
    molecules = random_selfies(2500, most=4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([weight(m) for m in molecules])
    weights = (weights - weights.mean()) / weights.std()
    texts = {"SELFIES": molecules}
    try:
        texts["SMILES"] = [importlib.import_module("selfies").decoder(m) for m in molecules]
    except ImportError:
        print("the package selfies, which writes SMILES, is not installed")
    print(f"{'':8s}  unigram entropy  masked loss  RMSE pre-trained  RMSE untrained  (of the mean: 1.0)")
    for name, lines in texts.items():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        tokenizer = ByteTokenizer.train(lines, size=300)
        ids, keep = tokenizer.encode(lines)

        def draw(rows: int, size: int = 16, ids=ids, keep=keep, generator=generator) -> tuple[Tensor, Tensor, Tensor]:
            picked = torch.randint(rows, (size,), generator=generator)
            n = int(keep[picked].sum(1).max())
            return picked, ids[picked, :n], keep[picked, :n]

        def riddles(draw=draw, tokenizer=tokenizer, generator=generator):
            for _ in range(given.steps):
                _, i, k = draw(2000)
                holes, chosen = mask_tokens(
                    i, k, mask=tokenizer.mask, vocabulary=len(tokenizer), specials=tokenizer.specials,
                    generator=generator,
                )  # fmt: skip
                yield {"ids": i, "holes": holes, "chosen": chosen, "keep": k}

        def labelled(draw=draw):
            for _ in range(TUNING):
                picked, i, k = draw(given.labelled)
                yield {"ids": i, "keep": k, "labels": weights[picked]}

        model = Selformer(vocabulary=len(tokenizer), dim=48, depth=2, heads=4, length=126, dropout=0.0)
        untrained = model.for_labels(1)
        history = train(model, riddles(), masked_loss, rate=warm_then_decay(5e-3, given.steps, warm_up=30))
        errors = []
        for network in (model.for_labels(1), untrained):
            train(
                network, labelled(), lambda m, ids, keep, labels: property_loss(m(ids, keep=keep), labels, "number"),
                rate=warm_then_decay(1e-3, TUNING, warm_up=10),
            )  # fmt: skip
            with torch.no_grad():
                found = network.eval()(ids[2000:], keep=keep[2000:]).flatten()
            errors.append((found - weights[2000:]).square().mean().sqrt().item())
        unigram = entropy(ids[keep & ~torch.isin(ids, torch.tensor(sorted(tokenizer.specials)))])
        reached = sum(history[-50:]) / 50
        print(f"{name:8s}  {unigram:15.2f}  {reached:11.2f}  {errors[0]:16.2f}  {errors[1]:14.2f}", flush=True)


if __name__ == "__main__":
    main()
