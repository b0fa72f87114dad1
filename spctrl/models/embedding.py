"""The spatial-text embedding: what turns an index map into an image for the ControlNet (REFERENCE section 9).

Each value of an index map stands for a keypoint or a link, and has a row in a small table; the embedding is a lookup.

Legend: B images of a batch, C output channels, H and W in pixels, K = 17 keypoints, S links, D = 768 the width of
CLIP's text embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spctrl.conditions.spatext import BACKGROUND, FIRST_KEYPOINT, FIRST_LINK
from spctrl.data.skeletons import AP10K, HUMANART
from spctrl.errors import ExpectedError
from spctrl.weights import TorchFileError, read_torch_file

SkeletonType = Literal["one", "zero", "rand", "interp_kpt"]
LinkTable = Literal["ap10k", "humanart"]
LayerVersion = Literal["sigmoid_version"]

KEYPOINTS, TEXT_WIDTH, MLP_WIDTH, DROPOUT = 17, 768, 256, 0.2
TABLE_ROWS = 70
"""Rows of the lookup table: values 0 to 69, so that the 19 links of HumanArt have theirs."""

COPIES = 8
"""Of the table, in ``look_up``: more are not faster."""

_INIT_SHAPE = (KEYPOINTS, TEXT_WIDTH)
_LINKS = {"ap10k": AP10K.links, "humanart": HUMANART.links}


class SpatextEmbedding(nn.Module):
    """Index maps to embeddings: keypoints by an MLP of their text embeddings, links by rows of their own.

    Value k in 1..17 becomes keypoint row k - 1, value 51 + s becomes link row s; every other value becomes zeros. In
    training mode one draw of the MLP's dropout is shared by all pixels of the batch.

    Attributes:
        keypoint_emb: (K, D) text embeddings of the keypoints; frozen unless ``learn_keypoints``.
        skeleton_emb: (S, C) rows of the links; frozen unless ``learn_skeleton``. Unused, and so frozen, with
            ``interp_kpt``.

    Args:
        channels: C.
        skeleton_type: rows of the links: ones, zeros, random (normal), or the mean of the rows of the two keypoints
            that a link connects.
        learn_keypoints: whether ``keypoint_emb`` is trained.
        learn_skeleton: whether ``skeleton_emb`` is trained.
        detach_links: with ``interp_kpt``, whether the links' pixels give the keypoints no gradient.
        layer_version: ``sigmoid_version`` squashes the keypoint rows into (0, 1), before links are interpolated.
        link_table: whose links: the released model has the 17 of AP-10K for HumanArt too, where values 68 and 69
            then stand for nothing.
        keypoint_init: (K, D) initial text embeddings; random normal without.

    Raises:
        ExpectedError: an unknown ``skeleton_type``, ``layer_version`` or ``link_table``, or ``keypoint_init`` of
            another shape.
    """

    def __init__(
        self,
        channels: int = 3,
        skeleton_type: SkeletonType = "one",
        *,
        learn_keypoints: bool = False,
        learn_skeleton: bool = False,
        detach_links: bool = False,
        layer_version: LayerVersion | None = None,
        link_table: LinkTable = "ap10k",
        keypoint_init: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check("skeleton_type", skeleton_type, get_args(SkeletonType))
        _check("layer_version", layer_version, (None, *get_args(LayerVersion)))
        _check("link_table", link_table, get_args(LinkTable))
        links = torch.tensor(_LINKS[link_table])
        self.interpolate = skeleton_type == "interp_kpt"
        self.detach_links = detach_links
        self.squash = layer_version == "sigmoid_version"
        initial = (
            torch.randn(_INIT_SHAPE) if keypoint_init is None else _check_init(keypoint_init, "keypoint_init")
        )
        self.keypoint_emb = nn.Parameter(initial, requires_grad=learn_keypoints)
        self.skeleton_emb = nn.Parameter(
            _link_rows(skeleton_type, len(links), channels),
            requires_grad=learn_skeleton and not self.interpolate,
        )
        self.linear_in = nn.Linear(TEXT_WIDTH, MLP_WIDTH)
        self.mlps = nn.ModuleList(
            layer for _ in range(3) for layer in (FeedForward(MLP_WIDTH), nn.LayerNorm(MLP_WIDTH))
        )
        self.linear_out = nn.Linear(MLP_WIDTH, channels)
        self.register_buffer("links", links, persistent=False)

    def forward(self, index_map: Tensor) -> Tensor:
        """Embeddings of index maps.

        Args:
            index_map: (B, 1, H, W), of any number type.

        Returns:
            (B, C, H, W), of the parameters' type, or autocast's.

        Raises:
            ValueError: not one channel.
        """
        if index_map.ndim != 4 or index_map.shape[1] != 1:
            raise ValueError(f"expected index maps of shape (B, 1, H, W), found {tuple(index_map.shape)}")
        table = self.table()
        # In float32: the gradient of a row is a sum over up to millions of pixels.
        return look_up(table.float(), known_values(index_map)).to(table.dtype)

    def table(self) -> Tensor:
        """The lookup table: (70, C), whose row v is what value v of an index map becomes."""
        keypoints = self.keypoint_rows()
        links = self.link_rows(keypoints).to(keypoints.dtype)
        return torch.cat(
            [
                _zeros(keypoints, FIRST_KEYPOINT),
                keypoints,
                _zeros(keypoints, FIRST_LINK - FIRST_KEYPOINT - len(keypoints)),
                links,
                _zeros(keypoints, TABLE_ROWS - FIRST_LINK - len(links)),
            ]
        )

    def keypoint_rows(self) -> Tensor:
        """(K, C)."""
        hidden = self.linear_in(self.keypoint_emb)
        for layer in self.mlps:
            hidden = layer(hidden)
        rows = self.linear_out(hidden)
        return rows.sigmoid() if self.squash else rows

    def link_rows(self, keypoint_rows: Tensor) -> Tensor:
        """(S, C)."""
        if not self.interpolate:
            return self.skeleton_emb
        ends = keypoint_rows.detach() if self.detach_links else keypoint_rows
        return ends[self.links].mean(dim=1)


def known_values(index_map: Tensor) -> Tensor:
    """Index maps as rows of the table: int32 of the same shape, background where a value is none of the table's."""
    index = index_map.clamp(BACKGROUND, TABLE_ROWS - 1).int()
    return index.mul_(index == index_map)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, each of C channels, for every pixel.

    Written for its backward pass, which adds up the gradients of all pixels with the same row. Added to one place in
    memory, they would wait for each other, and most pixels are background; so neighbouring pixels look up different
    copies of the table.

    Args:
        table: (R, C).
        index: (B, 1, H, W) int32, rows.

    Returns:
        (B, C, H, W), of the table's type.
    """
    copies = table.T.repeat(1, COPIES)  # (C, COPIES * R)
    copy = torch.arange(index.shape[-1], device=index.device) % COPIES
    place = (index + copy * len(table)).flatten(2)  # (B, 1, H * W)
    (channels, _), (images, _, height, width) = copies.shape, index.shape
    found = copies.expand(images, -1, -1).gather(2, place.expand(-1, channels, -1))
    return found.view(images, channels, height, width)


class FeedForward(nn.Module):
    """Two linear layers of the same width, with GELU between them and dropout after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(width, width),
            nn.Dropout(DROPOUT),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) to the same."""
        return self.ff(hidden)


def load_keypoint_init(path: Path) -> Tensor:
    """Initial text embeddings of the keypoints from a file: (K, D) float32.

    Args:
        path: a tensor saved by ``torch.save``; ``spctrl keypoint-embeddings`` writes one.

    Raises:
        ExpectedError: there is no such file, or it holds something else.
    """
    try:
        found = read_torch_file(path)
    except TorchFileError as error:
        raise ExpectedError(
            f"expected {_INIT_SHAPE} text embeddings in {path}, which cannot be read: {error}. "
            "`spctrl keypoint-embeddings` writes such a file."
        ) from None
    return _check_init(found, str(path))


def _check_init(found: object, where: str) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != _INIT_SHAPE:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ExpectedError(f"expected a tensor of text embeddings {_INIT_SHAPE} in {where}, found {what}")
    return found.detach().clone().float()


def _link_rows(skeleton_type: SkeletonType, count: int, channels: int) -> Tensor:
    if skeleton_type == "one":
        return torch.ones(count, channels)
    if skeleton_type == "rand":
        return torch.randn(count, channels)
    return torch.zeros(count, channels)


def _zeros(like: Tensor, count: int) -> Tensor:
    return like.new_zeros(count, like.shape[1])


def _check(name: str, found: object, valid: tuple[object, ...]) -> None:
    if found not in valid:
        raise ExpectedError(f"{name}: expected one of {', '.join(map(str, valid))}, found {found}")
