"""Tiles inside torch.compile and torch.export: one operator, the same numbers, any pattern made of plain values."""

import pytest
import torch
from torch import nn

from attnlab import attend
from attnlab.backends.tiles.traced import read, tell, tellable, traced_attention
from attnlab.nn.spatial.neighborhood import Offset
from attnlab.patterns import Causal, Documents, Explicit, Halo, Neighborhood, PowersOfTwo, Sinks, Window
from attnlab.problem import Lookup

PATTERNS = (
    Window(3) | Sinks(2) & Causal(),
    ~Window(9, causal=False),
    Neighborhood((6, 8), (3, 2), dilation=(1, 2), causal=(False, True)),
    Halo((6, 8), 3, 1),
    Window(5).starting_at(7),
    PowersOfTwo(8, 2, 0),
    Documents((20, 28)),
)


class Mixer(nn.Module):
    """Attention of two heads on a grid whose height the input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(25, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        grid = (x.shape[1] // 32, 32)
        bias = Lookup(self.table, Offset(grid, (3, 3), (1, 1)))
        return attend(q, k, v, pattern=Neighborhood(grid, 3) | Sinks(2), bias=bias).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_told_in_words_and_numbers_is_read_back_as_it_was(pattern):
    words, numbers = [], []
    tell(pattern, words, numbers)
    assert tellable(pattern) and read(" ".join(words), tuple(numbers)) == pattern


def test_a_pattern_of_tensors_is_left_to_other_backends():
    assert not tellable(Window(3) & Explicit(torch.ones(4, 4, dtype=torch.bool)))


def test_the_operator_fulfils_torchs_own_checks_and_equals_the_oracle():
    q, k, v = (torch.randn(2, h, 48, d, dtype=torch.float64, requires_grad=True) for h, d in ((4, 6), (2, 6), (2, 3)))
    for pattern in PATTERNS[:3]:
        words, numbers = [], []
        tell(pattern, words, numbers)
        arguments = q, k, v, None, f"*2 {' '.join(words)} None", numbers, 0.5
        torch.library.opcheck(
            torch.ops.attnlab.tile_attention.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        both = [traced_attention(q, k, v, pattern, 0.5)]
        both.append(attend(q, k, v, pattern=pattern, scale=0.5, return_lse=True, backend="reference"))
        grads = []
        for out, lse in both:
            loss = (out * torch.arange(3.0)).sum() + lse[lse.isfinite()].square().sum()
            grads.append(torch.autograd.grad(loss, (q, k, v)))
        for mine, oracle in zip((*both[0], *grads[0]), (*both[1], *grads[1]), strict=True):
            torch.testing.assert_close(mine, oracle)


def test_a_compiled_module_is_one_graph_for_grids_that_change_and_trains_alike():
    mixer = Mixer()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for tokens in (1024, 1056, 1120):
        x = torch.randn(1, tokens, 8, requires_grad=True)
        results = []
        for module in (mixer, compiled):
            out = module(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, mixer.wqkv.weight, mixer.table))))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)


def test_a_graph_can_name_only_what_is_imported():
    with pytest.raises(ValueError, match="the graph needs system of os: import it before the graph runs"):
        read("os:system #", (1,))


def test_an_exported_program_holds_the_operator():
    mixer, x = Mixer().eval(), torch.randn(1, 1024, 8)
    program = torch.export.export(mixer, (x,))
    assert any("attnlab.tile_attention" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), mixer(x))
