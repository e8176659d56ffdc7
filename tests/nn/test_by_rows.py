"""Rows apart are rows at once, and whoever watches a module sees it called once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnlab.models.skeletons.plain import TokenBlock
from attnlab.models.skeletons.pyramid import Block
from attnlab.nn import by_rows as module
from attnlab.nn.by_rows import by_rows
from attnlab.nn.spatial.multi_axis import BlockAttention


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTH", 1)
    monkeypatch.setattr(module, "_CACHED", 1)
    monkeypatch.setattr(module, "_ROWS", 5)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)).double().eval()


def counted(net: nn.Module, calls: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return net(x) + y[..., :4]

    return call


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (5, 6), (1, 6), (0, 3, 6)])
def test_rows_apart_are_rows_at_once(shape: tuple[int, ...]) -> None:
    net, calls = layers(), list[int]()
    x, y = torch.randn(2, *shape, dtype=torch.float64).movedim(1, -1).movedim(-1, 1)
    out = by_rows(counted(net, calls), x, y, through=[net[0], net[1], net[2], net[3]])
    torch.testing.assert_close(out, net(x) + y[..., :4])
    assert len(calls) == max(1, -(-x.shape[:-1].numel() // 5))


class Adapter(nn.Linear):
    """A linear layer of another class."""


def watched(net: nn.Sequential) -> None:
    net[1].register_forward_hook(lambda *_: None)


def adapted(net: nn.Sequential) -> None:
    net[1] = Adapter(6, 10).double().eval()


def training(net: nn.Sequential) -> None:
    net.train()


@torch.no_grad()
@pytest.mark.parametrize("change", [watched, adapted, training])
def test_whoever_would_notice_sees_one_call(change: Callable[[nn.Sequential], None]) -> None:
    net, calls = layers(), list[int]()
    change(net)
    by_rows(counted(net, calls), torch.randn(12, 6).double(), torch.randn(12, 6).double(), through=list(net))
    assert calls == [12]


def test_gradients_are_recorded_at_once() -> None:
    net, calls = layers(), list[int]()
    by_rows(counted(net, calls), torch.randn(12, 6).double(), torch.randn(12, 6).double(), through=list(net))
    assert calls == [12]


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5}, {"post_norm": True}])
def test_blocks_are_the_same_in_rows(options: dict[str, object]) -> None:
    block = Block(4, nn.Conv2d(4, 4, 3, padding=1), **options).double().eval()  # type: ignore[arg-type]
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    wanted = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted.detach())


def test_token_blocks_are_the_same_in_rows() -> None:
    block = TokenBlock(4, nn.Identity(), layer_scale=0.5).double().eval()
    block.mixer.forward = lambda x, grid: x.flip(1)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    wanted = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted.detach())


@torch.no_grad()
@pytest.mark.parametrize("biased", [True, False])
def test_windows_apart_are_windows_at_once(biased: bool) -> None:
    mixer = BlockAttention(8, heads=2, window=2, biased=biased).double().eval()
    x = torch.randn(3, 24, 8, dtype=torch.float64)
    apart = mixer(x, grid=(4, 6))
    mixer.wo.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(apart, mixer(x, grid=(4, 6)))
