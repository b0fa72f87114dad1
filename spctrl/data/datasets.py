"""What is particular to a dataset: its files' names, its skeleton, its licence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spctrl.data.skeletons import AP10K as AP10K_SKELETON
from spctrl.data.skeletons import HUMANART as HUMANART_SKELETON

MAX_IMAGE_FILE_BYTES = 2**30
"""More than 8 bytes for each of the most pixels that the index lets through by default. A sparse file costs nothing and
claims any size."""

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spctrl.data.skeletons import Skeleton


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One of the two raw formats.

    Attributes:
        name: as in settings and file names.
        title: as people write it.
        skeleton: keypoints and drawn links.
        annotation_pattern: path of an annotation file below the dataset's root; ``{split}`` is the dataset's
            own word for the split and ``{variant}`` what tells its annotation files apart (AP-10K: split id,
            HumanArt: subset).
        split_words: our split names -> the dataset's.
        image_folders: below the root; all images lie in one of them, in the first where their names do not say.
        file_name_prefix: leading part of ``file_name`` that names the root itself.
        artifact_prefix: leading part of an image's path that conditions do not repeat.
        licence: of the annotations and images, as its publishers state it.
        source_url: where to get it.
        backgrounds: AP-10K's background ids and their names.
    """

    name: str
    title: str
    skeleton: Skeleton
    annotation_pattern: str
    split_words: Mapping[str, str]
    image_folders: Sequence[str]
    file_name_prefix: str
    artifact_prefix: str
    licence: str
    source_url: str
    backgrounds: Mapping[int, str] = field(default_factory=dict)

    def annotation_path(self, split: str, variant: str) -> str:
        """Path of the annotation file below the dataset's root."""
        if split not in self.split_words:
            raise ValueError(
                f"expected a split of {self.title} among {', '.join(self.split_words)}, found {split!r}"
            )
        return self.annotation_pattern.format(split=self.split_words[split], variant=variant)

    def image_path(self, file_name: str) -> str:
        """Path of an image below the dataset's root, whether or not ``file_name`` starts with the root's own name."""
        if not self.file_name_prefix:
            return f"{self.image_folders[0]}/{file_name}"
        return file_name.removeprefix(self.file_name_prefix)

    def artifact_stem(self, file_name: str) -> str:
        """Path of the image's conditions in their folders, without suffix."""
        return self.stem_of(self.image_path(file_name))

    def stem_of(self, image_path: str) -> str:
        """The same from the image's path below the dataset's root."""
        path = image_path.removeprefix(self.artifact_prefix)
        stem, dot, suffix = path.rpartition(".")
        return stem if dot and "/" not in suffix else path


AP10K = Dataset(
    name="ap10k",
    title="AP-10K",
    skeleton=AP10K_SKELETON,
    annotation_pattern="annotations/ap10k-{split}-split{variant}.json",
    split_words={"train": "train", "val": "val", "test": "test"},
    image_folders=("data",),
    file_name_prefix="",
    artifact_prefix="data/",
    licence="CC-BY 4.0",
    source_url="https://github.com/AlexTheBad/AP-10K",
    backgrounds={
        1: "grass or savanna",
        2: "forest or shrub",
        3: "mud or rock",
        4: "snowfield",
        5: "zoo or human habitation",
        6: "swamp or riverside",
        7: "desert or gobi",
        8: "mugshot",
        9: "forest",
        88: "dark",
    },
)

HUMANART = Dataset(
    name="humanart",
    title="HumanArt",
    skeleton=HUMANART_SKELETON,
    annotation_pattern="annotations/{split}_{variant}.json",
    split_words={"train": "training", "val": "validation"},
    image_folders=("images", "coco"),
    file_name_prefix="HumanArt/",
    artifact_prefix="images/",
    licence="non-commercial research (request form)",
    source_url="https://github.com/IDEA-Research/HumanArt",
)

DATASETS = {dataset.name: dataset for dataset in (AP10K, HUMANART)}
