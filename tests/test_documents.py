"""What the documents show works as they show it."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from attnlab import cards
from conformance.claims import Subject, claims_of, compiles, exports

ROOT = Path(__file__).parents[1]


def code(document: str) -> list[str]:
    """The Python blocks of a document."""
    return [
        textwrap.dedent(b) for b in re.findall(r"^ *```python\n(.*?)^ *```", (ROOT / document).read_text(), re.M | re.S)
    ]


def test_the_guides_mechanism_passes_every_claim_of_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnlab.nn.multihead import MultiHead

    cards.entries()  # all there is, before the table is swapped for a copy that goes with this test
    monkeypatch.setattr(cards, "_entries", dict(cards._entries))
    names = {**vars(cards), "MultiHead": MultiHead, "nn": nn, "torch": torch}
    exec(code("CONTRIBUTING.md")[0], names)
    subject = Subject(names["Tempered"].card, names["Tempered"])
    for check in claims_of(subject.card):
        if check not in (compiles, exports):
            check(subject)


def test_the_readmes_ten_lines_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    block, _ = code("README.md")
    monkeypatch.chdir(tmp_path)
    # The last line reads a released checkpoint, which users have and tests do not.
    exec(block.rsplit("\n", 2)[0].replace("16384", "512"), {})
    assert "tiles" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"dinat_tiny\.pth"):
        exec("import attnlab\n" + block.rstrip().rsplit("\n", 1)[1], {})


def test_the_readmes_lines_on_models_that_are_there_run(timm) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=4).eval()
    _, block = code("README.md")
    names = {"model": model, "images": torch.randn(1, 3, 112, 112)}
    exec(block.replace("heads=[0, 5]", "heads=[0, 2]"), names)
    assert len(names["record"].layers) == 4
    assert not torch.equal(names["logits"], model(names["images"]))
    names["local"].undo()


def test_the_page_of_systems_is_what_the_cards_say() -> None:
    # In a process of its own, where no test has registered anything.
    page = "import runpy; print(runpy.run_path('docs/list_systems.py')['page'](), end='')"
    found = subprocess.run([sys.executable, "-c", page], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == (ROOT / "docs" / "systems.md").read_text(), "write it anew: python docs/list_systems.py"
