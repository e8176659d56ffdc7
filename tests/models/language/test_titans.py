"""Titans language models: the paper's rounded sizes, and what each variant is made of."""

from __future__ import annotations

import pytest
import torch

from attnlab.models.language.titans import SIZES, Titans
from attnlab.nn.memory.neural_memory import NeuralMemory
from attnlab.nn.memory.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer

SMALL = dict(vocabulary=20, dim=16, depth=2, heads=2, hidden=16)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_within_a_hundredth_of_the_papers_rounded_counts(name: str):
    nominal = 1e6 * int(name.removeprefix("titans_").removesuffix("m"))
    assert abs(SIZES[name].params - nominal) < 0.01 * nominal


@pytest.mark.parametrize(
    ("variant", "kind"),
    [("lmm", NeuralMemory), ("mac", MemoryAsContext), ("mag", MemoryAsGate), ("mal", MemoryAsLayer)],
)
def test_each_variant_streams_what_it_reads_at_once(variant: str, kind: type):
    torch.manual_seed(0)
    model = Titans(**SMALL, variant=variant).double().eval()
    assert all(type(block.mixer) is kind for block in model.blocks)
    ids = torch.randint(20, (2, 21))
    with torch.no_grad():
        state, out = model.initial_state(2), []
        for piece in ids.split([1, 17, 1, 2], 1):
            y, state = model(piece, state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), model(ids), rtol=0, atol=1e-10)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variant must be one of lmm, mac, mag, mal"):
        Titans(**SMALL, variant="max")
