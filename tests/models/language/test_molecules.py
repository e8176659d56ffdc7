"""Molecules: real ones from generated strings, what cannot be written is left out, scaffolds stay together."""

from __future__ import annotations

import sys

import pytest
import torch

from attnlab.models.language.molecules import (
    FRAGMENTS,
    random_selfies,
    scaffold,
    scaffold_split,
    selfies_of,
    symbols,
)

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


def test_generated_strings_are_molecules_with_every_fragment():
    package = pytest.importorskip("selfies")
    molecules = random_selfies(200, generator=torch.Generator().manual_seed(0))
    assert molecules == random_selfies(200, generator=torch.Generator().manual_seed(0))
    assert len(set(molecules)) > 150 and all(any(f in m for m in molecules) for f in FRAGMENTS)
    assert all(package.decoder(m) for m in molecules)
    assert all("".join(symbols(m)) == m for m in molecules)
    for fragment in FRAGMENTS:
        # Alone, a fragment uses all that it writes: no symbol is read as a count or lost to a full valence.
        atoms = sum(c.isupper() or c in "cnos" for c in package.decoder(fragment + "[C]").replace("Cl", "Q"))
        used = sum(len(symbols(f)) for f in [fragment]) - 2 * ("Branch1][" in fragment) - 2 * ("Ring1]" in fragment)
        assert atoms == used + 1 or "=Branch1" in fragment or "Ring" in fragment


def test_smiles_become_selfies_and_failures_are_dropped():
    package = pytest.importorskip("selfies")
    found = selfies_of([ASPIRIN, "C*C", "CCO"])
    assert list(found) == [ASPIRIN, "CCO"] and found["CCO"] == "[C][C][O]"
    assert package.encoder(package.decoder(found[ASPIRIN])) == found[ASPIRIN]


def test_molecules_of_one_scaffold_stay_together():
    groups = ["benzene"] * 6 + ["pyridine"] * 3 + ["furan", "thiophene", "pyridine", "indole"] * 2 + ["one", "two", "x"]
    parts = scaffold_split(groups)
    assert sorted(p for part in parts for p in part) == list(range(len(groups)))
    sets = [{groups[p] for p in part} for part in parts]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert len(parts[0]) <= 0.8 * len(groups) and len(parts[0]) >= 0.7 * len(groups)
    # The commonest train, the rarest test.
    assert "benzene" in sets[0] and "pyridine" in sets[0] and sets[2] <= {"one", "two", "x", "indole", "thiophene"}


def test_scaffolds_are_rings_and_what_joins_them():
    pytest.importorskip("rdkit")
    assert scaffold(ASPIRIN) == "c1ccccc1" and scaffold("CCO") == ""


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match="symbols in brackets, got 'CCO'"):
        symbols("CCO")
    with pytest.raises(ValueError, match="least"):
        random_selfies(3, least=8)
    with pytest.raises(ValueError, match="sum to 1"):
        scaffold_split(["a"], (0.8, 0.1, 0.2))
    monkeypatch.setitem(sys.modules, "selfies", None)
    with pytest.raises(ImportError, match=r"attnlab\[molecules\]"):
        selfies_of(["C"])
