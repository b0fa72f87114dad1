"""Draws docs/conditions.png from what ``make demo`` built: ``.venv/bin/python docs/make_picture.py``."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from spctrl.report.pictures import colourise_index_map

EXPORTS = Path("build/demo/exports")
PICTURE = Path("docs/conditions.png")
ROWS = (("AP-10K", "train_split1", 0), ("AP-10K", "val_split1", 9), ("HumanArt", "train_split1", 1))
COLUMNS = ("image", "spatext", "openpose", "mask", "depth", "masked_depth")
HEIGHT_PX, GAP_PX = 150, 4


def main() -> None:
    """One row for each chosen record, one column for its image and each condition."""
    rows = []
    for dataset, split, position in ROWS:
        folder = EXPORTS / f"{dataset}_triplet"
        record = pq.read_table(folder / "manifests" / f"{split}.parquet").slice(position, 1).to_pylist()[0]
        rows.append(cv2.hconcat([_cell(folder, record, column) for column in COLUMNS]))
    width = max(row.shape[1] for row in rows)
    padded = [
        cv2.copyMakeBorder(row, 0, GAP_PX, 0, width - row.shape[1], cv2.BORDER_CONSTANT, value=(255,) * 3)
        for row in rows
    ]
    cv2.imwrite(str(PICTURE), cv2.vconcat(padded))


def _cell(folder: Path, record: dict[str, str], column: str) -> np.ndarray:
    path = str(folder / record[f"{column}_path"])
    if column == "spatext":
        index_map = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        picture = colourise_index_map(index_map)
    else:
        picture = cv2.imread(path, cv2.IMREAD_COLOR)
    width = round(picture.shape[1] * HEIGHT_PX / picture.shape[0])
    small = cv2.resize(picture, (width, HEIGHT_PX), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(small, 0, 0, 0, GAP_PX, cv2.BORDER_CONSTANT, value=(255,) * 3)


if __name__ == "__main__":
    main()
