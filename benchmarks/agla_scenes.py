"""Does a second view that shows only what is asked about keep a model from guessing? AGLA on scenes of coloured shapes.

    python benchmarks/agla_scenes.py [--seed 0] [--scenes 1000]

A small LLaVA learns to say the colour of a shape among sixteen under noise; in four scenes of five a shape has its
usual colour, so that the question alone answers most, and parts of the images may be black. Then, where a scene goes
against the habit: how often the answer is right, and how often the usual colour, which is not there, is seen. With the
whole image, and with the logits of a second view added: one that shows the cell of the shape, one that shows half of
the image with the cell in it, and, for a control, one that shows another cell.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from backbones import load_timm
from torch import Tensor

from attnlab.lens.edits.agla import assemble
from attnlab.lens.toys.scenes import END, Scene, Scenes


def seen(scene: Scene, cells: Tensor, scenes: Scenes) -> Tensor:
    """The scene's pixels, black but for cells (B, cells)."""
    mask = cells.view(-1, 1, *scenes.grid)
    return scene.pixels * mask.repeat_interleave(scenes.patch, 2).repeat_interleave(scenes.patch, 3)


def taught(scenes: Scenes, seed: int) -> Any:
    """A LLaVA that sees shapes, then the habit, with parts of the images black."""
    model = scenes.llava(depth=3, seed=seed).train()
    generator = torch.Generator().manual_seed(seed)
    for steps, rate, scene_of in ((300, 3e-3, replace(scenes, noise=0.3)), (120, 1e-3, scenes)):
        optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            if steps == 300:
                scene = scene_of.draw(48, generator, habit=1 / scenes.colours, questions=6)
                asking = (scene.ids > END) & (scene.ids <= END + scenes.cells)
                logits = model(**scene.inputs()).logits[asking]
                answers = torch.cat([scene.ids[:, 1:], scene.answers[:, None]], 1)[asking]
            else:
                scene = scene_of.draw(96, generator)
                share = torch.rand(96, 1, generator=generator)
                share[torch.rand(96, generator=generator) < 0.5] = 1.0
                lit = (torch.rand(96, scenes.cells, generator=generator) < share).float()
                lit.scatter_(1, scene.cells[:, None], 1.0)
                answers = scene.answers
                logits = model(input_ids=scene.ids, pixel_values=seen(scene, lit, scenes)).logits[:, -1]
            loss = F.cross_entropy(logits, answers)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=2000)
    chosen = parser.parse_args(arguments)
    load_timm()  # what transformers needs of torchvision
    start = time.process_time()
    scenes = Scenes(noise=0.6, tint=2.0, dark=1.0)
    with torch.enable_grad():
        model = taught(scenes, chosen.seed)
    print(f"{time.process_time() - start:.0f} s of training")

    generator = torch.Generator().manual_seed(chosen.seed + 1)
    scene = scenes.draw(chosen.scenes, generator, habit=0.0)
    none = torch.zeros(chosen.scenes, scenes.cells)
    own = none.scatter(1, scene.cells[:, None], 1.0)
    other = none.scatter(1, (scene.cells[:, None] + 3) % scenes.cells, 1.0)
    half = (torch.rand(none.shape, generator=generator) < 0.5).float().maximum(own)

    def said(logits: Tensor) -> str:
        answer = logits.argmax(-1)
        right, habit = ((answer == x).float().mean().item() for x in (scene.answers, scene.habits))
        return f"{right:8.3f}{habit:10.3f}"

    whole = model(**scene.inputs()).logits[:, -1]
    print(f"{'against the habit':<44}{'right':>8}{'guessed':>10}")
    print(f"{'the whole image':<44}{said(whole)}")
    for name, cells in (("the cell", own), ("half, the cell in it", half), ("another cell", other)):
        view = model(input_ids=scene.ids, pixel_values=seen(scene, cells, scenes)).logits[:, -1]
        print(f"{name + ' alone':<44}{said(view)}")
        for beta in (0.5, 0.1):
            print(f"{f'whole + 2 × {name}, beta = {beta}':<44}{said(assemble(whole, view, beta=beta))}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
