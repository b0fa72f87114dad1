"""A folder of PNG files that someone else made."""

from __future__ import annotations

import functools
import os
from pathlib import Path


class PngFolder:
    """PNG files by path, whose suffix may be written in upper case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Listing a folder once costs less than looking for each of its files under several names.
        self._suffixes_in = functools.cache(self._upper_case_suffixes)

    def path_of(self, stem: str) -> str:
        """``<stem>.png``, or where there is no such file one with that suffix in upper case; below the folder."""
        folder, _, name = stem.rpartition("/")
        return f"{stem}{self._suffixes_in(folder).get(name, '.png')}"

    def _upper_case_suffixes(self, folder: str) -> dict[str, str]:
        """Suffix by stem of the files ``<stem>.PNG``, ``<stem>.Png``, ... without a ``<stem>.png`` beside them."""
        try:
            names = sorted(os.listdir(self.folder / folder))  # noqa: PTH208 - a Path costs more than the name
        except (OSError, ValueError):
            return {}
        png = [(name[:-4], name[-4:]) for name in names if name[-4:].lower() == ".png"]
        lower = {stem for stem, suffix in png if suffix == ".png"}
        return {stem: suffix for stem, suffix in png if stem not in lower}
