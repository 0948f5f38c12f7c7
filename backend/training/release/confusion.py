"""The confusion matrix as a picture, readable at 10 classes and at 101, and bounded at 2,000."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.release.metrics import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

DPI = 130
LARGEST_SIDE = 5000 / DPI  # inches: a viewer shows 5,000 pixels, and they take 100 MB to draw
MOST_COUNTED = 150  # classes whose cells have room for a count
LONGEST_NAME = 32
SMALLEST_NAME = 6.0  # points
MISTAKES_TOP = 0.3  # mistakes are small shares: their scale ends here so that one of 10% is seen

logger = logging.getLogger(__name__)


def write_confusion_matrix(results: Results, path: Path) -> None:
    """Draw the matrix as PNG: correct answers blue, mistakes orange, with counts if they fit."""
    from matplotlib.figure import Figure  # takes a second, which only a release should pay

    counts = np.array(results["confusion_matrix"], dtype=np.int32)
    names = [_shortened(name) for name in results["classes"]]
    points = float(np.interp(len(names), [10, 101, 300], [11, 7.5, SMALLEST_NAME]))
    margin = 0.01 * points * max(map(len, names)) + 0.6  # inches that the names take
    cell = float(np.interp(len(names), [10, 101], [0.6, 0.24]))  # inches; 0.24 holds 7.5 points
    matrix = min(cell * len(names), LARGEST_SIDE - margin - 0.8)
    side = max(matrix + margin + 0.8, 4.5)
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((margin / side, margin / side, matrix / side, matrix / side))
    if len(names) <= MOST_COUNTED:
        _draw_cells(axes, counts, points)
    else:
        _draw_squares(axes, counts)
    _name_axes(axes, names, points, step=_name_step(matrix / len(names), points))
    title = f"{results['num_images']:,} test images, top-1 {100 * results['top1']:.1f}%"
    large = max(points + 3, 0.5 * side)
    axes.set_xlabel("predicted", fontsize=large)
    axes.set_ylabel("actual", fontsize=large)
    axes.set_title(title, fontsize=large + 2, loc="left", pad=12)
    _save(figure, path)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _shares(counts: np.ndarray) -> np.ndarray:
    supports = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return (counts / supports).astype(np.float32)


def _draw_cells(axes: "Axes", counts: np.ndarray, points: float) -> None:
    """Color each cell by its share of the row, and write its count."""
    import seaborn

    shares, diagonal = _shares(counts), np.eye(len(counts), dtype=bool)
    for shown, colors, top in ((diagonal, "Blues", 1.0), (~diagonal, "Oranges", MISTAKES_TOP)):
        seaborn.heatmap(
            shares,
            mask=~shown | (counts == 0),
            cmap=colors,
            vmin=0,
            vmax=top,
            cbar=False,
            linewidths=0.4,
            linecolor="#dddddd",
            # seaborn's own labels and annotations take half a minute for 101 classes
            xticklabels=False,
            yticklabels=False,
            ax=axes,
        )
        for row, column in np.argwhere(counts * shown):
            axes.annotate(
                str(counts[row, column]),
                (column + 0.5, row + 0.5),
                color="white" if shares[row, column] > 0.6 * top else "black",
                size=points,
                ha="center",
                va="center_baseline",
            )


def _draw_squares(axes: "Axes", counts: np.ndarray) -> None:
    """Color the cells that are not empty, as bare squares.

    An image or a mesh of all cells takes up to a gigabyte, and most of 4 million are empty.
    """
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection

    rows, columns = np.nonzero(counts)
    shares, is_right = _shares(counts)[rows, columns], rows == columns
    # a single image is to be seen in a cell of two pixels
    colors = colormaps["Oranges"](np.maximum(shares / MISTAKES_TOP, 0.35))
    colors[is_right] = colormaps["Blues"](shares[is_right])
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    squares = np.stack([columns, rows], axis=1)[:, None] + corners  # (cells, 4, 2)
    axes.add_collection(
        PolyCollection(squares, facecolors=colors, linewidths=0, antialiaseds=False)
    )
    axes.set(xlim=(0, len(counts)), ylim=(len(counts), 0))


def _name_step(cell_inches: float, points: float) -> int:
    """How many classes from one written name to the next, so that they do not touch."""
    return int(np.ceil(1.3 * points / 72 / cell_inches))


def _name_axes(axes: "Axes", names: list[str], points: float, step: int) -> None:
    places = np.arange(0, len(names), step)
    shown = [names[place] for place in places]
    axes.set_xticks(places + 0.5, shown, rotation=90)
    axes.set_yticks(places + 0.5, shown)
    labels: list[Text] = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    for label in labels:
        label.set_parse_math(False)  # a dish may be called "$5 menu to $10"
    axes.grid(visible=False)
    axes.patch.set(facecolor="white")
    for spine in axes.spines.values():
        spine.set(visible=True, color="#bbbbbb")
    axes.tick_params(labelsize=points, length=0 if step == 1 else 3)


def _save(figure: "Figure", path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph")
        figure.savefig(path, dpi=DPI, format="png")
    if any("Glyph" in str(warning.message) for warning in caught):
        logger.warning("%s: its font lacks letters of some class names", path.name)
