"""From heatmaps to keypoints, all instances at once.

Legend: N instances, K keypoints, h, w height and width of a heatmap in cells. Coordinates are cells, x before y.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eval.vitpose.crops import Codec

BLUR_KERNEL = 11
"""Width of DARK's blur in cells for heatmaps trained with sigma 2 (mmpose's ``UDPHeatmap``)."""
_LOG_FLOOR, _LOG_CEILING = 1e-3, 50.0
_HESSIAN_EPSILON = np.float64(np.finfo(np.float32).eps)
"""Of mmpose, which adds it in float64."""


def decode(heatmaps: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Keypoints (N, K, 2) and their scores (N, K), the maxima, of finite float32 heatmaps (N, K, h, w).

    The same as mmpose 1.3.2's codecs. Both look for the keypoint of a heatmap without a positive value at (-1, -1).
    There ``udp`` refines it with what is near in memory, as mmpose does (see ``_neighbourhoods``), so that it may end
    elsewhere. It stays at (-1, -1) where mmpose's result is not a number, as of a heatmap of zeros.
    """
    w = heatmaps.shape[3]
    scores, flat = heatmaps.flatten(2).max(dim=2)
    peaks = torch.stack([flat % w, flat // w], dim=-1)
    peaks = torch.where(scores[..., None] > 0, peaks, -1)
    refine = _towards_second_maximum if codec == "msra" else _distribution_aware
    return peaks + refine(heatmaps, peaks), scores


def merge_flipped(
    straight: torch.Tensor, flipped: torch.Tensor, flip_indices: torch.Tensor, *, shift: bool
) -> torch.Tensor:
    """Mean of heatmaps (N, K, h, w) of images and of their mirror images.

    Args:
        straight, flipped: the network's outputs.
        flip_indices: (K,) which keypoint each one is in the mirror image.
        shift: move the mirrored-back heatmap right by a cell (the first column stays): a crop without UDP lands one
            cell beside its mirror image's.
    """
    back = flipped.flip(-1)[:, flip_indices]
    if shift:
        back = torch.cat([back[..., :1], back[..., :-1]], dim=-1)
    return (straight + back) * 0.5


def _towards_second_maximum(heatmaps: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """A quarter of a cell towards the larger neighbour, per axis; as mmpose's ``refine_keypoints`` near borders."""
    h, w = heatmaps.shape[2:]
    x, y = peaks.unbind(-1)
    around = _neighbourhoods(heatmaps, peaks)
    dx = around[..., 1, 2] - around[..., 1, 0]
    dy = around[..., 2, 1] - around[..., 0, 1]
    dx = torch.where((x > 1) & (x < w - 1) & (y > 0), dx, 0.0)
    dy = torch.where((y > 1) & (y < h - 1) & (x > 0), dy, 0.0)
    return 0.25 * torch.stack([dx, dy], dim=-1).sign()


def _distribution_aware(heatmaps: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """DARK (Zhang et al., CVPR 2020) as UDP uses it: one Newton step on the logarithm of the blurred heatmap.

    It is computed with OpenCV and numpy, on the CPU, in mmpose's order: where a heatmap is flat, the Hessian is hardly
    more than rounding errors, which decide where the step leads. No step is taken where it is not a finite number.
    """
    maps = heatmaps.cpu()
    blurred = _blur(maps)
    blurred *= maps.amax((2, 3), keepdim=True) / blurred.amax((2, 3), keepdim=True)
    around = _neighbourhoods(blurred, peaks.cpu()).numpy()
    steps = _newton_steps(np.log(np.clip(around, _LOG_FLOOR, _LOG_CEILING)))
    finite = np.isfinite(steps).all(axis=-1, keepdims=True)
    return torch.from_numpy(np.where(finite, steps, np.float32(0))).to(heatmaps.device)


def _newton_steps(around: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, K, 2) steps to the extrema of the quadratics through values (N, K, 3, 3), from their centres."""
    (before, above, _), (left, centre, right), (_, below, after) = np.moveaxis(around, (2, 3), (0, 1))
    dx, dy = 0.5 * (right - left), 0.5 * (below - above)
    xx = right - 2 * centre + left + _HESSIAN_EPSILON
    yy = below - 2 * centre + above + _HESSIAN_EPSILON
    xy = (0.5 * (after - right - below + centre + centre - left - above + before)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.stack([xy * dy - yy * dx, xy * dx - xx * dy], axis=-1) / (xx * yy - xy * xy)[..., None]
        return np.asarray(steps, np.float32)


def _blur(heatmaps: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with zeros outside, of heatmaps on the CPU; OpenCV derives the sigma from the kernel's width."""
    size = (BLUR_KERNEL, BLUR_KERNEL)
    maps = heatmaps.contiguous().flatten(0, 1).numpy()
    blurred = np.empty_like(maps)
    for source, target in zip(maps, blurred, strict=True):
        cv2.GaussianBlur(source, size, 0, dst=target, borderType=cv2.BORDER_CONSTANT)
    return torch.from_numpy(blurred).view_as(heatmaps)


def _neighbourhoods(heatmaps: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """(N, K, 3, 3) values around each peak, rows y - 1 to y + 1; border values repeat one cell outside.

    As in mmpose, the padded maps of an instance lie one behind the other, and what is before the first is the last. So
    the cells above and left of (-1, -1), the padding's corner, are the end of the previous keypoint's map.
    """
    K, h, w = heatmaps.shape[1:]
    padded = F.pad(heatmaps, (1, 1, 1, 1), mode="replicate").flatten(1)
    row = w + 2
    starts = torch.arange(K, device=heatmaps.device) * (h + 2) * row
    centres = starts + (peaks[..., 1] + 1) * row + peaks[..., 0] + 1
    steps = torch.arange(-1, 2, device=heatmaps.device)
    cells = centres[..., None, None] + steps[:, None] * row + steps
    return padded.gather(1, cells.flatten(1) % padded.shape[1]).view(*peaks.shape[:2], 3, 3)
