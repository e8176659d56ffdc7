"""What all tests share: one thread each (they run side by side), a fixed seed, and the folder of golden files."""

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens", default=str(Path(__file__).parent / "goldens"), help="folder of golden files to check"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
