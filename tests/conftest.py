"""What all tests share: one thread each (they run side by side), a fixed seed, and the folder of golden files."""

from pathlib import Path

import pytest
import torch

from attnlab.torchvision_schemas import declare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens", default=str(Path(__file__).parent / "goldens"), help="folder of golden files to check"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def torchvision_schemas() -> None:
    """timm and transformers import torchvision where it is installed, whose operators may be for another torch."""
    declare()


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
