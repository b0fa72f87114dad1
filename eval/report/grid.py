"""Best and worst cases as a figure for the paper: PNG, and PDF with text as text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.report.cases import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

CELL_INCHES = 1.35
DPI = 240
FONT_SIZE = 7.5


def render_grid(cases: Sequence[Case]) -> tuple[bytes, bytes]:
    """The grid as PNG and as PDF; the same cases give the same bytes."""
    figure = _figure(cases)
    png, pdf = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    figure.savefig(
        pdf, format="pdf", dpi=DPI, metadata={"CreationDate": None, "Creator": None, "Producer": None}
    )
    return png.getvalue(), pdf.getvalue()


def _figure(cases: Sequence[Case]) -> Figure:
    from matplotlib.figure import Figure

    columns = [panel.column for panel in cases[0].panels]
    figure = Figure(figsize=(CELL_INCHES * len(columns), CELL_INCHES * 1.12 * len(cases)))
    axes = figure.subplots(len(cases), len(columns), squeeze=False)
    figure.subplots_adjust(
        left=0.05, right=0.995, top=1 - 0.25 / len(cases) / 1.2, bottom=0.02, wspace=0.04, hspace=0.16
    )
    for row, case in zip(axes, cases, strict=True):
        for axis, panel in zip(row, case.panels, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if panel.picture is None:
                axis.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=FONT_SIZE)
            else:
                axis.imshow(_square(panel.picture)[:, :, ::-1], interpolation="none")
            axis.set_xlabel(panel.caption, fontsize=FONT_SIZE - 1, labelpad=1.5)
        row[0].set_ylabel(f"{case.kind}, {case.oks:.2f}", fontsize=FONT_SIZE - 1)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=FONT_SIZE, pad=3)
    return figure


def _square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture in the middle of a white square, so that all cells of the grid are of one size."""
    height, width = picture.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square
