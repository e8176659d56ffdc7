"""Patterns as text: what is written down reads back as itself, and nothing but patterns is ever built."""

import subprocess
import sys

import pytest
import torch

from attnlab.hub import read_pattern, spell_pattern
from attnlab.patterns import Causal, Explicit, Neighborhood, PowersOfTwo, Prefixed, Sinks, Window
from attnlab.routing import ProxyHeads, TopKBlocks

WHERES = [
    Window(512) | (Sinks(4) & Causal()), PowersOfTwo(block=64), Prefixed(Neighborhood((8, 8), 3), 1), ~Window(3),
    ProxyHeads(0.9), TopKBlocks(8, block=256),
]  # fmt: skip


@pytest.mark.parametrize("where", WHERES, ids=str)
def test_reads_back_what_was_spelled(where) -> None:
    assert read_pattern(spell_pattern(where)) == where


def test_a_table_is_one_class_with_its_fields() -> None:
    assert read_pattern({"name": "Neighborhood", "grid": [8, 8], "kernel": 3}) == Neighborhood((8, 8), 3)


@pytest.mark.parametrize(
    "text",
    ["foo(1)", "Window(", "Window('a')", "__import__('os')", "Window(1) + Window(2)", "Window(nope=1)", "3",
     "ProxyHeads(0.9) & Causal()", "Window(*[1])", "Window(__import__('os'))"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"spell a pattern|names no pattern|fit Window|combines a route|size must be"):
        read_pattern(text)


def test_what_holds_a_tensor_cannot_be_spelled() -> None:
    with pytest.raises(ValueError, match="numbers alone"):
        spell_pattern(Explicit(torch.ones(3, 3, dtype=torch.bool)))


def test_the_hub_loads_none_of_the_libraries_that_it_serves() -> None:
    code = (
        "import sys; from attnlab.hub import load_official, register_timm, register_transformers, swap; "
        "print(sorted({'timm', 'transformers', 'diffusers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
