"""Molecules as SELFIES strings: from SMILES, of a small grammar, and in sets that share no scaffold.

The package selfies, of the `molecules` extra, turns SMILES into SELFIES; RDKit, of the same, finds scaffolds.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

# Pieces of molecules, each of which another may follow: the symbol behind [Branch1] or [Ring1] counts its atoms.
FRAGMENTS = (
    "[C]",
    "[C][C]",
    "[O]",
    "[N]",
    "[S]",
    "[C][Branch1][C][F]",
    "[C][Branch1][C][Cl]",
    "[C][=Branch1][C][=O]",
    "[C][Branch1][C][C]",
    "[C][Branch1][C][O]",
    "[C][=C][C][=C][C][=C][Ring1][=Branch1]",
    "[C][C][C][C][C][Ring1][Branch1]",
)


def _package(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {name.split('.')[0]!r}: pip install 'attnlab[molecules]'"
        ) from error


def selfies_of(smiles: Iterable[str]) -> dict[str, str]:
    """The SELFIES string of each SMILES string that has one; the others are left out."""
    package = _package("selfies", "selfies_of")
    found = {}
    for molecule in smiles:
        try:
            found[molecule] = package.encoder(molecule)
        except package.EncoderError:
            continue
    return found


def symbols(selfies: str) -> list[str]:
    """The symbols `[…]` of a SELFIES string, and the dots between its molecules."""
    found = re.findall(r"\[[^\[\]]+\]|\.", selfies)
    if "".join(found) != selfies:
        raise ValueError(f"selfies must consist of symbols in brackets, got {selfies!r}")
    return found


def random_selfies(count: int, *, least: int = 2, most: int = 7, generator: torch.Generator | None = None) -> list[str]:
    """`count` molecules of `least` to `most` fragments each, drawn alike: data where there is no library."""
    if not 1 <= least <= most:
        raise ValueError(f"least must be between 1 and most = {most}, got {least}")
    lengths = torch.randint(least, most + 1, (count,), generator=generator)
    drawn = torch.randint(len(FRAGMENTS), (count, most), generator=generator)
    return ["".join(FRAGMENTS[i] for i in row[:n]) for row, n in zip(drawn.tolist(), lengths.tolist(), strict=True)]


def scaffold(smiles: str) -> str:
    """The Bemis-Murcko scaffold, rings and what joins them, as SMILES."""
    return _package("rdkit.Chem.Scaffolds.MurckoScaffold", "scaffold").MurckoScaffoldSmiles(smiles=smiles)


def scaffold_split(
    scaffolds: Sequence[Hashable], sizes: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> tuple[list[int], list[int], list[int]]:
    """Positions to train, validate and test with, such that molecules of one scaffold stay together.

    As MoleculeNet does it: the commonest scaffolds train, the rarest test.
    """
    if min(sizes) < 0 or abs(sum(sizes) - 1) > 1e-6:
        raise ValueError(f"sizes must be three shares that sum to 1, got {sizes}")
    groups: dict[Hashable, list[int]] = {}
    for position, group in enumerate(scaffolds):
        groups.setdefault(group, []).append(position)
    total = len(scaffolds)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for members in sorted(groups.values(), key=lambda m: (len(m), -m[0]), reverse=True):
        if len(parts[0]) + len(members) <= sizes[0] * total:
            parts[0].extend(members)
        elif len(parts[1]) + len(members) <= sizes[1] * total:
            parts[1].extend(members)
        else:
            parts[2].extend(members)
    return parts
