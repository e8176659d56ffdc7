"""Do two tasks use the same heads, and do idle heads work when they are pointed? (arXiv 2310.08744)

    python benchmarks/circuits.py                       a toy that learns two tasks at once: half a minute
    python benchmarks/circuits.py --model gpt2-medium   IOI and Colored Objects on weights in a local folder

Of each task: the heads that write the answer (direct effects on the logits), and those that these listen to by their
keys or queries; then how many of one circuit's heads are in the other. On GPT-2 medium the paper finds 78 %, and that
pointing four idle heads at the wrong colours lifts Colored Objects from 49.6 % to 93.7 %: give them with --point.
"""

import argparse

import torch
from torch import Tensor

from attnlab.lens.circuits.overlap import in_list_accuracy, make_inhibit, overlap, top_heads
from attnlab.lens.circuits.patching import path_patching
from attnlab.lens.circuits.prompts import coloured_objects, encode, equally_long, indirect_objects
from attnlab.lens.circuits.traces import run
from attnlab.lens.steer import steer
from attnlab.lens.toys import recall
from attnlab.lens.toys.network import NOT_ASKED, fit, small_decoder

HEADS, LENGTH = 8, 12


def both(steps: int) -> torch.nn.Module:
    """A decoder that learns recall and the second telling of a text together."""

    def draw(level: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        if int(torch.randint(2, (), generator=rng)):
            told = recall._pairs(48, level, rng).view(48, level, 2)
            order = torch.rand(48, level, generator=rng).argsort(1)
            again = told.gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)
            ids = torch.cat((told.flatten(1), again), 1)[:, :-1]
            targets = torch.full_like(ids, NOT_ASKED)
            targets[:, 2 * level :: 2] = again[:, 1::2]
        else:
            told = text(48, level + 4, rng)
            ids = torch.cat((told, told[:, :-1]), 1)
            targets = torch.full_like(ids, NOT_ASKED)
            targets[:, level + 4 :] = told[:, 1:]
        return ids, targets

    model = small_decoder(recall.VOCABULARY, heads=HEADS)
    fit(model, draw, steps=steps, levels=range(2, recall.PAIRS + 1))
    return model


def text(size: int, length: int, rng: torch.Generator) -> Tensor:
    return torch.rand(size, recall.VOCABULARY, generator=rng).argsort(1)[:, :length]


def swapped(ids: Tensor, answers: Tensor) -> Tensor:
    """The prompts with what stands before the first of each two answers and before the second changed about."""
    places = (ids[:, :, None] == answers[:, None]).double().argmax(1) - 1
    return ids.scatter(1, places, ids.gather(1, places.flip(1)))


def recalled(size: int) -> tuple[Tensor, Tensor]:
    prompts = recall.batch(size, seed=1)
    return prompts.ids, torch.stack((prompts.answers, prompts.wrong[:, 0]), 1)


def told_again(size: int) -> tuple[Tensor, Tensor]:
    told = text(size, LENGTH, torch.Generator().manual_seed(2))
    return torch.cat((told, told[:, 4:6]), 1), told[:, [6, 9]]


def circuit(model: torch.nn.Module, ids: Tensor, answers: Tensor) -> set[tuple[int, int]]:
    """The three heads that write most of the answer, and the two that they hear most by their keys."""
    corrupt = swapped(ids, answers)
    writers = path_patching(model, ids, corrupt, answers, receivers="blocks.1")
    movers = top_heads(writers, 3)
    heard = path_patching(model, ids, corrupt, answers, receivers=movers, part="k", position=None)
    found = {*movers, *top_heads(heard, 2)}
    accuracy = (run(model, ids)[:, -1].argmax(-1) == answers[:, 0]).double().mean()
    print(f"  accuracy {accuracy:.3f}; direct effect {writers.sum():.2f}, by keys {heard.sum():.2f}; {sorted(found)}")
    return found


def toy(steps: int) -> None:
    model = both(steps)
    print("recall:")
    one = circuit(model, *recalled(128))
    print("a text told twice:")
    other = circuit(model, *told_again(128))
    chance = (3 * 3 / HEADS + 2 * 2 / HEADS) / 5
    print(f"of the heads of recall, {overlap(one, other):.0%} are in the other circuit (drawn by chance, {chance:.0%})")


def gpt2(folder: str, count: int, batch: int, point: list[tuple[int, int]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def ids_of(words: str) -> list[int]:
        return tokenizer(words).input_ids

    last = f"transformer.h.{model.config.n_layer - 1}"
    found = []
    for name, pairs in (("IOI", indirect_objects(count)), ("Colored Objects", coloured_objects(count))):
        pairs = equally_long(pairs, ids_of)[0]
        clean, corrupt, answers = encode(pairs, ids_of)
        writers = path_patching(model, clean, corrupt, answers, receivers=last, batch=batch)
        movers = top_heads(writers, 4)
        heard = path_patching(model, clean, corrupt, answers, receivers=movers, part="q", batch=batch)
        found.append({*movers, *top_heads(heard, 4)})
        print(f"{name}: movers {movers}, heard by their queries {top_heads(heard, 4)}")
    print(f"overlap {overlap(*found):.0%}")
    choices = torch.tensor([[ids_of(p.right)[0], *(ids_of(w)[0] for w in p.wrong)] for p in pairs])
    places = torch.stack([(clean == c[:, None]).long().cumsum(1).argmax(1) for c in choices[:, 1:].T], 1)
    print(f"accuracy among the colours in the list: {in_list_accuracy(run(model, clean), choices, choices[:, 0]):.1%}")
    if point:
        with steer(model, make_inhibit(point, places)):
            print(f"with {point} pointed: {in_list_accuracy(run(model, clean), choices, choices[:, 0]):.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--model", help="a folder with a GPT-2")
    parser.add_argument("--count", type=int, default=1000, help="prompts of each task")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--point", nargs="*", default=[], metavar="LAYER.HEAD")
    given = parser.parse_args()
    if given.model:
        pairs = [tuple(map(int, p.split("."))) for p in given.point]
        gpt2(given.model, given.count, given.batch, pairs)
    else:
        toy(given.steps)
