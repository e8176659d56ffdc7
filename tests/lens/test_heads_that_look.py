"""The guide to heads that look at the image runs, prints what it shows, and what it concludes holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "heads_that_look.md"


def shape(text: str) -> str:
    """The text without its numbers, which differ from machine to machine."""
    return re.sub(r" +", " ", re.sub(r"-?\d+(\.\d+)?", "#", text)).strip()


@pytest.mark.slow
def test_the_guide_runs_and_prints_what_it_shows(transformers, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", GUIDE.read_text(), re.M | re.S)
    assert len(blocks) > 8
    names: dict = {}
    printed = ""
    for block, shown in blocks:
        exec(block, names)
        out = capsys.readouterr().out
        assert shape(out) == shape(shown)
        printed += out

    model, against, looking = names["model"], names["against"], names["looking"]
    lens, answers = names["lens"], names["answers"]

    def rates(*edits):
        with lens.steer(model, list(edits)):
            said = answers(against)
        return [float((said == which).float().mean()) for which in (against.answers, against.habits)]

    right, habit = rates()
    assert right > 0.35 and habit > 0.1  # it sees, and it has its habit
    layer = "model.language_model.layers.0.*"
    assert rates(names["Ablate"](layers=layer, heads=looking))[0] < right - 0.15
    assert rates(lens.ReinforceHeads(alpha=2.0, layers=range(3)))[1] < habit
    assert names["auroc"] > 0.6  # answers that owe less to the image are the habitual ones
    said = names["guided"](names["seen"], names["unseen"], guidance=3.0).argmax(-1)
    assert float((said == against.habits).float().mean()) < habit

    # Hiding the planted sinks costs nothing, and what they give away goes to the other cells.
    found = re.findall(r"right ([\d.]+) %; attention: sinks ([\d.]+), other cells ([\d.]+)", printed)
    plain, sunk, hidden, redistributed = [[float(x) for x in row] for row in found]
    assert hidden[0] > plain[0] - 3
    assert redistributed[1] < sunk[1] and redistributed[2] > sunk[2]
    # Attention to the image rises with the emphasis.
    masses = []
    for alpha in (0.0, 0.3, 0.9, 2.0):
        attention = lens.ImageAttention()
        emphasised = rates(lens.EmphasiseTokens(names["image"], alpha=alpha, layers=range(3)), attention)
        assert alpha in (0.0, 2.0) or emphasised[1] < habit  # and the habit gives way to a moderate one
        masses.append(attention.sensitivity().mean())
    assert torch.equal(torch.stack(masses), torch.stack(masses).sort().values)
