"""Draw the picture of the README: twelve patterns, each from its own definition.

python docs/draw_patterns.py        writes docs/patterns.svg
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from attnlab.patterns import (
    Axial,
    Blocks,
    Causal,
    Dilated,
    Documents,
    Halo,
    Neighborhood,
    PowersOfTwo,
    Prefix,
    Sinks,
    Window,
)

GRID = (8, 8)
PATTERNS = {
    "Causal()": Causal(),
    "Window(9)": Window(9),
    "Window(9) | (Sinks(3) & Causal())": Window(9) | (Sinks(3) & Causal()),
    "PowersOfTwo(block=4, window=1)": PowersOfTwo(block=4, window=1),
    "Dilated(4)": Dilated(4),
    "Documents((12, 30, 22)) & Causal()": Documents((12, 30, 22)) & Causal(),
    "Prefix(16)": Prefix(16),
    "Neighborhood(grid, kernel=3)": Neighborhood(GRID, kernel=3),
    "Neighborhood(grid, kernel=3, dilation=2)": Neighborhood(GRID, kernel=3, dilation=2),
    "Blocks(grid, size=4, shift=2)": Blocks(GRID, size=4, shift=2),
    "Halo(grid, block=4, halo=1)": Halo(GRID, block=4, halo=1),
    "Axial(grid, axis=0) | Axial(grid, axis=1)": Axial(GRID, axis=0) | Axial(GRID, axis=1),
}


def main() -> None:
    plt.rcParams.update({"font.family": "monospace", "svg.hashsalt": "attnlab"})
    figure, axes = plt.subplots(3, 4, figsize=(12, 9.6), layout="constrained")
    colours = ListedColormap(["#f4f1ea", "#2b5d8a"])
    for axis, (name, pattern) in zip(axes.flat, PATTERNS.items(), strict=True):
        axis.imshow(pattern.matrix(64), cmap=colours, interpolation="nearest")
        axis.set_title(name, fontsize=7.5)
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
        axis.set_xlabel(f"{pattern.density(64):.0%} of pairs", fontsize=7)
    figure.savefig(Path(__file__).with_name("patterns.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
