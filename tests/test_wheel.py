"""The wheel builds, installs without extras, and its command line works."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_installs_into_a_clean_environment(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "attnlab/py.typed" in names
    assert any(n.endswith("report.html.j2") for n in names)
    assert {n.rsplit(".", 1)[1] for n in names if n.startswith("attnlab/lens/viewer/page/")} == {"css", "j2", "js"}
    assert not [n for n in names if not n.startswith(("attnlab/", "attnlab-"))]

    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True)
    listed = subprocess.run(
        [python.with_name("attnlab"), "list"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "multihead" in listed.stdout
