"""The same on real processes that talk by gloo, two and four of them: one launch for all checks of `ranks.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKS = {
    2: ("attention", "models", "counts"),
    4: (
        "attention",
        "groups",
        "scans",
        "models",
        "training",
        "checkpoints",
        "counts",
        "memory",
        "refusals",
        "dies",
        "hangs",
        "interrupted",
    ),
}
LOST = {"dies": 0, "hangs": 2}  # who does not live to tell


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    """The folder in which each rank of a group of so many says what it found."""
    folders, running = {}, {}
    for world, names in CHECKS.items():
        folders[world] = tmp_path_factory.mktemp(f"ranks{world}")
        command = [sys.executable, str(HERE / "ranks.py"), str(folders[world]), str(world), *names]
        running[world] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = {world: process.communicate(timeout=900)[0] for world, process in running.items()}
    return folders, said


@pytest.mark.parametrize(("world", "check"), [(w, c) for w, names in CHECKS.items() for c in names])
def test_ranks_agree_with_one_process(groups, world: int, check: str) -> None:
    folders, said = groups
    for rank in (r for r in range(world) if r != LOST.get(check)):
        found = folders[world] / f"{check}.{rank}"
        assert found.exists(), f"rank {rank} did not come to {check}: {said[world][-3000:]}"
        assert not found.read_text(), f"rank {rank}: {found.read_text()}"


@pytest.mark.slow
def test_the_demonstration_trains_and_goes_on(tmp_path: Path) -> None:
    def run(steps: int) -> list[float]:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "attnlab", "scale"),
            *("--length", "128", "--dim", "32", "--depth", "2", "--mixer", "kda,multihead", "--fsdp"),
            *("--steps", str(steps), "--checkpoint", str(tmp_path), "--every", "2"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert said.returncode == 0, said.stderr[-3000:]
        return [float(line.split("loss ")[1].split()[0]) for line in said.stdout.splitlines() if "loss" in line]

    assert len(run(3)) == 3
    assert len(run(5)) == 3  # from the checkpoint after two steps on
