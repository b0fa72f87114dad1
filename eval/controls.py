"""Methods whose order is known, to see that a benchmark tells good from bad: python -m eval.controls write | check

``ground-truth`` is the real images, ``noise`` the same images under noise, and ``shuffled`` gives each pose the image
of another. With a pose estimator that knows such images, pose AP must fall in this order. ``make order`` runs it with
the small network of ``eval.vitpose.small`` on drawn images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from eval.images import read_rgb
from spctrl.data.datasets import DATASETS
from spctrl.inference.folders import generated_path
from spctrl.output.terminal import say

CONTROLS = ("ground-truth", "noise", "shuffled")
NOISE_LEVELS = 96.0
"""Standard deviation of the noise, of 255: poses can still be seen, but not as well."""


def write_controls(images: Sequence[tuple[str, Path]], folder: Path, *, seed: int = 0) -> None:
    """Write the images of all three methods, ``<method>/<image name>/0.<suffix>``.

    Args:
        images: name without suffix and file of each, at least two.
        folder: to write below.
        seed: of the noise.
    """
    if len(images) < 2:
        raise ValueError(f"expected at least 2 images to shuffle, found {len(images)}")
    generator = np.random.default_rng(seed)
    others = [*images[1:], images[0]]
    for (name, file), (_, other) in zip(images, others, strict=True):
        truth, noise, shuffled = (
            (folder / method / generated_path(name, 0)).with_suffix(".png") for method in CONTROLS
        )
        for path in (truth, noise, shuffled):
            path.parent.mkdir(parents=True, exist_ok=True)
        pixels = read_rgb(file)
        shutil.copyfile(file, truth.with_suffix(file.suffix))
        shutil.copyfile(other, shuffled.with_suffix(other.suffix))
        noisy = pixels + generator.normal(0, NOISE_LEVELS, pixels.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(noise)


def images_of(root: Path, dataset: str, split: str, variant: str) -> list[tuple[str, Path]]:
    """Name and file of each image of a split, in the annotations' order."""
    layout = DATASETS[dataset]
    content = json.loads((root / layout.annotation_path(split, variant)).read_bytes())
    names = [image["file_name"] for image in content["images"]]
    return [(layout.artifact_stem(name), root / layout.image_path(name)) for name in names]


def order_faults(table: Path) -> list[str]:
    """What is wrong with the order of the methods in a benchmark's table.json; nothing where it is right.

    Each method's pose AP must be lower than that of the one before, with intervals that do not touch.
    """
    rows = json.loads(table.read_bytes())["numbers"]
    found = {
        row["method"]: row
        for row in rows
        if row["metric"] == "AP" and not row["kind"] and row["value"] is not None
    }
    missing = [method for method in CONTROLS if method not in found]
    if missing:
        return [f"expected pose AP of {', '.join(CONTROLS)} in {table}, found none of {', '.join(missing)}"]
    return [
        f"expected {better} above {worse}, found {_interval(found[better])} and {_interval(found[worse])}"
        for better, worse in itertools.pairwise(CONTROLS)
        if not _edge(found[better], "low") > _edge(found[worse], "high")
    ]


def _edge(row: Mapping[str, float], name: str) -> float:
    """Of the interval; the value where there is none, as when all poses are right."""
    return row["value"] if row[name] is None else row[name]


def _interval(row: Mapping[str, float]) -> str:
    return f"{row['value']:.2f} [{_edge(row, 'low'):.2f}, {_edge(row, 'high'):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    write = commands.add_parser("write", help="write the images of the methods")
    write.add_argument("data", type=Path, help="the dataset's folder, such as data/AP-10K")
    write.add_argument("folder", type=Path, help="for the images")
    write.add_argument("--dataset", choices=sorted(DATASETS), default="ap10k")
    write.add_argument("--split", default="val")
    write.add_argument("--variant", default="1", help="AP-10K's split id, or HumanArt's subset")
    check = commands.add_parser("check", help="fail unless a benchmark puts them in order")
    check.add_argument("table", type=Path, help="its table.json")
    arguments = parser.parse_args()
    if arguments.command == "check":
        if faults := order_faults(arguments.table):
            sys.exit("\n".join(faults))
        say(f"In order: {', '.join(CONTROLS)}.")
        return
    images = images_of(arguments.data, arguments.dataset, arguments.split, arguments.variant)
    write_controls(images, arguments.folder)
    say(f"{len(images):,} images of each of {', '.join(CONTROLS)} in {arguments.folder}")


if __name__ == "__main__":
    main()
