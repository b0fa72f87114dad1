"""Names of files in an exported triplet dataset: those of SP-Ctrl's README, or those that its released loaders open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spctrl.data.datasets import Dataset

_FOLDERS = {
    "ap10k": {"spatext": "pose_kptindex", "openpose": "mmpose_skeleton"},
    "humanart": {"spatext": "humanart_kptindex", "openpose": "humanart_openpose"},
}
_COMMON_FOLDERS = {"mask": "sam_hq_mask", "depth": "zeo_depth", "masked_depth": "zeo_depth_masked"}
_SHARD_SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet"}
_RELEASED_JSONL = {
    ("humanart", "train"): "humanart_training.jsonl",
    ("humanart", "val"): "humanart_validation.jsonl",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the files of one split go, relative to the dataset's export folder.

    Attributes:
        dataset: whose.
        split: ``train``, ``val`` or ``test``.
        split_id: the number in ``<split>_split<n>``.
        names: ``readme`` or ``released``.
        openpose_style: decides the folder of renders under the released names.
    """

    dataset: Dataset
    split: str
    split_id: str
    names: str
    openpose_style: str

    @property
    def split_name(self) -> str:
        return f"{self.split}_split{self.split_id}"

    @property
    def folder(self) -> str:
        """The export folder itself, below ``[paths] export``."""
        return f"{self.dataset.title}_triplet"

    @property
    def manifest(self) -> str:
        return f"manifests/{self.split_name}.parquet"

    @property
    def records(self) -> str:
        """The file with one JSON line per image."""
        released = _RELEASED_JSONL.get((self.dataset.name, self.split)) if self.names == "released" else None
        return released or f"{self.split_name}.jsonl"

    @property
    def categories(self) -> str:
        return "catgories.jsonl" if self.names == "released" else "categories.jsonl"

    def shard(self, kind: str, number: int) -> str:
        """A file of many samples; ``kind`` is ``webdataset`` or ``parquet``."""
        return f"{kind}/{self.split_name}-{number:06d}{_SHARD_SUFFIXES[kind]}"

    def image(self, file_name: str) -> str:
        return self.dataset.image_path(file_name)

    def condition(self, name: str, file_name: str) -> str | None:
        """None for latents: they stay in the store's packs, which loaders map into memory."""
        if name == "latents":
            return None
        return f"{self._condition_folder(name)}/{self.dataset.artifact_stem(file_name)}.png"

    def heatmaps(self, file_name: str) -> str:
        prefix = "humanart_" if self.dataset.name == "humanart" else ""
        return f"{prefix}heatmap_multichannel_npy/{self.dataset.artifact_stem(file_name)}.npy"

    def pose(self, file_name: str) -> str:
        """HumanArt's JSON file of one image."""
        return f"pose/{self.dataset.artifact_stem(file_name)}.json"

    def dirname(self, file_name: str) -> str:
        """HumanArt's ``dirname``: the image's folder, led by the dataset's own name."""
        path = self.image(file_name)
        prefix = self.dataset.file_name_prefix if path.startswith(f"{self.dataset.image_folders[0]}/") else ""
        return f"{prefix}{PurePosixPath(path).parent}"

    def _condition_folder(self, name: str) -> str:
        if name == "openpose" and self.names == "released" and self.dataset.name == "ap10k":
            if self.openpose_style == "keypoints":
                return f"only_keypoint/{self.split_name}_openpose_keypoint"
            return f"{self.split_name}_openpose_skeleton"
        return {**_COMMON_FOLDERS, **_FOLDERS[self.dataset.name]}[name]
