"""What all tests share: one thread each (they run side by side), a fixed seed, and the folder of golden files."""

import sys
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens", default=str(Path(__file__).parent / "goldens"), help="folder of golden files to check"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def timm():
    """timm as a peer, or a skip with the reason.

    timm imports torchvision, whose compiled operators do not load beside a CPU build of torch; the two schemas that its
    import asks for are enough for timm.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        pytest.skip(f"timm needs torchvision: {error}")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    return pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
