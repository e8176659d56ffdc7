"""What the tasks of the benchmark share: pattern, the names of their metrics, and where their files lie."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from attnlab.arena.task import CAUSAL, CAUSAL_CROSS, CROSS, SELF, Score, Task, digest_of

TINY, MEDIUM, PAPER = "cab-tiny", "cab-medium", "cab-paper"
PATTERN_OF = {
    SELF: "noncausal_self", CAUSAL: "causal_self", CROSS: "noncausal_cross", CAUSAL_CROSS: "causal_cross",
}  # fmt: skip
METRICS = "metrics"  # under this name the details of a score hold the benchmark's metrics


class CabTask(Task):
    """One of the benchmark's tasks; its pattern follows from its layout.

    "cab-tiny" and "cab-medium" bring their own data, "cab-paper" reads the benchmark's from `data`: the folder
    `folder`, or one that holds it.
    """

    reads = "cab"
    about: ClassVar[str]  # the benchmark's name of the task: "TTS"
    prefix: ClassVar[str] = ""  # before the name of a metric, where several tasks make up one of the benchmark's
    signs: ClassVar[dict[str, int]]  # metric → 1 where more is better, else −1; the first is what trials are scored by
    folder: ClassVar[str]  # of the benchmark's data
    source: ClassVar[str]  # what the files are and where they come from

    def load(self) -> None:
        if self.data is not None:
            if self.budget is not self.budgets.get(PAPER):
                raise ValueError(f"data: {self.name} reads data at its published size alone; leave data out")
            inside = self.data / self.folder
            self.read(inside if inside.is_dir() else self.data)
        elif self.budget is self.budgets.get(PAPER):
            raise FileNotFoundError(
                f"data: {self.name} at its published size reads {self.folder}/ from the folder given with --data-dir: "
                f"{self.source}"
            )
        else:
            self.make()

    def read(self, root: Path) -> None:
        """Reads the benchmark's data."""
        raise NotImplementedError

    def make(self) -> None:
        """Generates data, or takes those that come with an installed package."""
        raise NotImplementedError

    def arrays(self) -> list[np.ndarray | bytes]:
        """The data, for `digest`."""
        raise NotImplementedError

    @property
    def pattern(self) -> str:
        return PATTERN_OF[self.layout]

    def find(self, root: Path, *names: str) -> Path:
        """The first of these files or folders that is there."""
        for name in names:
            if (root / name).exists():
                return root / name
        missing = " or ".join(names)
        raise FileNotFoundError(f"data: {root} has no {missing}; the task {self.name} reads {self.source}")

    def scored(self, *values: float) -> Score:
        """A score from the metrics, in the order of `signs`."""
        named = dict(zip(self.signs, values, strict=True))
        return Score(values[0], {METRICS: named})

    def digest(self) -> str:
        """Changes with the data and with the code that makes and measures them."""
        here = sorted(Path(__file__).parent.glob("*.py"))
        return digest_of(*(path.read_bytes() for path in here), *self.arrays())
