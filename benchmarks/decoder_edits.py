"""What four edits of a decoder do to a tiny LLaVA that has learnt to see and, later, a habit.

    python benchmarks/decoder_edits.py                heads, emphasis, guidance, sinks (one model, 20 s of training)
    python benchmarks/decoder_edits.py concentric     raster against concentric positions, eight small models

Rates are over scenes against the habit: right (what the image shows), habit (a hallucination); "overall" is the share
of right answers where the habit holds as in training. Each table's first row is the model as it is: the peer.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch
from backbones import load_timm
from torch import Tensor

from attnlab import lens
from attnlab.lens.edits.emphasise import guided
from attnlab.lens.edits.guidance import without_image
from attnlab.lens.edits.heads import Ablate, MaskKeys
from attnlab.lens.edits.redistribute import RedistributeSinks
from attnlab.lens.toys.grid_recall import GridRecall
from attnlab.lens.toys.scenes import IMAGE, Scene, Scenes

DECODER = "model.language_model.*"


def say(model, scene: Scene, edits=()) -> Tensor:
    """The token that the model answers each question with."""
    with ExitStack() as stack, torch.no_grad():
        if edits:
            stack.enter_context(lens.steer(model, list(edits)))
        return model(**scene.inputs(), logits_to_keep=1).logits[:, -1].argmax(-1)


def auroc(high: Tensor, low: Tensor) -> float:
    """How often one of `high` is above one of `low`."""
    return float(((high[:, None] > low).float() + 0.5 * (high[:, None] == low).float()).mean())


def percent(hits: Tensor) -> float:
    return round(100 * float(hits.float().mean()), 1)


def rates(model, against: Scene, usual: Scene, edits=()) -> str:
    said, overall = say(model, against, edits), say(model, usual, edits) == usual.answers
    right, habit = percent(said == against.answers), percent(said == against.habits)
    return f"right {right:5.1f}   habit {habit:5.1f}   overall {percent(overall):5.1f}"


def edits() -> None:
    scenes = Scenes(noise=0.25, covered=0.2)
    model = scenes.train(scenes.llava())
    generator = torch.Generator().manual_seed(1)
    against, usual = scenes.draw(600, generator, habit=0.0), scenes.draw(600, generator)
    image, depth = against.ids[0] == IMAGE, len(model.model.language_model.layers)

    print("\nHeads: divergence, attention to the image, and right answers when switched off")
    divergence, attention = lens.HeadDivergence(), lens.ImageAttention()
    said = say(model, against, [divergence, attention])
    for layer in range(depth):
        off = [
            percent(say(model, against, [Ablate(layers=f"{DECODER}layers.{layer}.*", heads=h)]) == against.answers)
            for h in range(4)
        ]
        vhd = [round(x, 2) for x in divergence.found[layer].mean((0, 2)).tolist()]
        mass = [round(x, 2) for x in attention.sensitivity()[layer].tolist()]
        print(f"layer {layer}   VHD {vhd}   image {mass}   off {off}")
    right, habit = said == against.answers, said == against.habits
    for k in (1, 2, 4):
        token = divergence.token_divergence(k)[:, 0]
        print(f"T-VHD, k = {k}: right answers above habitual ones, AUROC {auroc(token[right], token[habit]):.3f}")

    print("\nReinforced heads")
    for layers in (None, [depth - 1], range(depth)):
        for alpha in (1.0, 1.5, 2.0, 4.0):
            edit = lens.ReinforceHeads(alpha=alpha, layers=layers)
            print(f"layers {layers!s:12} alpha {alpha}   {rates(model, against, usual, [edit])}")

    print("\nEmphasised image")
    for alpha in (0.0, 0.3, 0.6, 0.9, 2.0, 4.0):
        edit, seen = lens.EmphasiseTokens(image, alpha=alpha, layers=range(depth)), lens.ImageAttention()
        say(model, against, [edit, seen])
        mass = float(seen.sensitivity().mean())
        print(f"alpha {alpha}   image {mass:.3f}   {rates(model, against, usual, [edit])}")

    print("\nGuidance by the image")
    with torch.no_grad():
        pairs = [
            (s, *(model(**inputs).logits[:, -1] for inputs in (s.inputs(), without_image(model, s.inputs()))))
            for s in (against, usual)
        ]
    for guidance in (1.0, 1.1, 1.5, 2.0, 3.0):
        told = [guided(seen, unseen, guidance=guidance).argmax(-1) for _, seen, unseen in pairs]
        right, habit = percent(told[0] == against.answers), percent(told[0] == against.habits)
        print(f"guidance {guidance}   right {right}   habit {habit}   overall {percent(told[1] == usual.answers)}")

    print("\nTwo planted sinks")
    sinks(scenes, model, usual)


def sinks(scenes: Scenes, model, usual: Scene) -> None:
    """Two image tokens become one and the same massive vector, which the last query likes."""
    slots = [4, 11]
    usual = usual.where((usual.cells != slots[0] - 1) & (usual.cells != slots[1] - 1))
    decoder = model.model.language_model
    layer, head = decoder.layers[0], 3
    with lens.watch(
        model, layers=f"{DECODER}layers.0.*", keep=lambda event, out: event.q[:, head, -1].mean(0)
    ) as record:
        say(model, usual)
    keys = layer.self_attn.k_proj.weight.detach().unflatten(0, (4, -1))[head] * layer.input_layernorm.weight.detach()
    liked = record[f"{DECODER}layers.0.*"].to(keys) @ keys
    channels = liked.abs().topk(2).indices
    vector = torch.zeros_like(liked)
    vector[channels] = 30 * liked[channels].sign()

    def plant(module, arguments, keywords):
        hidden = (arguments[0] if arguments else keywords["hidden_states"]).clone()
        hidden[:, slots] = vector
        return (hidden, *arguments[1:]), keywords

    def report(name: str, edits=()) -> None:
        with lens.watch(model, layers=DECODER, keep=lambda event, out: event.weights()[:, :, -1].mean(0)) as record:
            right = percent(say(model, usual, edits) == usual.answers)
        rows = [record[f"{DECODER}layers.{i}.*"] for i in range(len(decoder.layers))]
        rest = [i for i in range(1, 1 + scenes.cells) if i not in slots]
        on = [[round(float(row[:, where].sum(-1).mean()), 3) for row in rows] for where in (slots, rest)]
        print(f"{name:28} right {right:5.1f}   attention by layer: the two {on[0]}, the image's others {on[1]}")

    report("as it is")
    handle = layer.register_forward_pre_hook(plant, with_kwargs=True)
    report("with sinks")
    report("the sinks hidden", [MaskKeys(slots, layers=DECODER)])
    edit = RedistributeSinks(channels.tolist(), tau=4.0, first=0)
    report("the sinks' share given away", [edit])
    print("found as sinks in every scene:", {i: s.all(0).nonzero()[:, 0].tolist() for i, s in edit.sinks.items()})
    handle.remove()


def concentric() -> None:
    task = GridRecall()
    for base in (100.0, 10000.0):
        for steps in (60, 120):
            for name in ("raster", "concentric"):
                reader = task.reader(base=base)
                with ExitStack() as stack:
                    if name == "concentric":
                        edit = lens.ConcentricPositions((task.side, task.side), task.image())
                        stack.enter_context(lens.steer(reader, [edit]))
                    bands = [round(100 * x, 1) for x in task.right(task.train(reader, steps=steps))]
                print(f"base {base:7.0f}   {steps:3} steps   {name:12} right, top to bottom: {bands}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    load_timm()  # makes torchvision importable where it is broken, for transformers
    concentric() if sys.argv[1:] == ["concentric"] else edits()
