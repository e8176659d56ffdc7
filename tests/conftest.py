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
def torchvision_schemas() -> torch.library.Library | None:
    """What an import of torchvision needs: its compiled operators do not load beside a CPU build of torch.

    timm and transformers import torchvision where it is installed; for them two schemas are enough.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return library  # kept by this fixture: its schemas go with it
    return None


@pytest.fixture(scope="session")
def timm(torchvision_schemas):
    """timm as a peer, or a skip with the reason."""
    pytest.importorskip("torchvision", reason="timm needs torchvision")
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def transformers(torchvision_schemas):
    """transformers as a peer, or a skip with the reason."""
    return pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
