"""Where the parts of a checkpoint lie: a folder as released, as training here leaves it, or in diffusers' format."""

from __future__ import annotations

from pathlib import Path

LEARNED_EMBEDS = "learned_embeds.bin"


def network_folder(checkpoint: Path) -> Path:
    """The folder with the network's ``config.json``: the checkpoint itself, or ``controlnet`` or ``adapter`` in it."""
    for folder in (checkpoint, checkpoint / "controlnet", checkpoint / "adapter"):
        if (folder / "config.json").is_file():
            return folder
    return checkpoint


def learned_embeds_file(checkpoint: Path) -> Path | None:
    """The keypoint tokens in or beside the network's folder; None where there are none."""
    network = network_folder(checkpoint)
    for folder in (network, network.parent):
        if (folder / LEARNED_EMBEDS).is_file():
            return folder / LEARNED_EMBEDS
    return None
