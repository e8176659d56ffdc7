"""What the arena's tests share: toys that are registered for one test, and gone after it."""

import sys
from pathlib import Path

import pytest
import torch

from attnlab import cards
from attnlab.arena import jobs, task

TOYS = Path(__file__).with_name("toys.py")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toys(monkeypatch):
    """Registers the toys; the registries are as before after the test, so that no other test meets them."""
    cards.entries()
    task.tasks()
    monkeypatch.setattr(cards, "_entries", dict(cards._entries))
    monkeypatch.setattr(task, "_TASKS", dict(task._TASKS))
    monkeypatch.delitem(sys.modules, "attnlab_loaded_toys", raising=False)
    jobs.load_files([TOYS])
    jobs._loaded.cache_clear()
    yield TOYS
    sys.modules.pop("attnlab_loaded_toys", None)
    jobs._loaded.cache_clear()
