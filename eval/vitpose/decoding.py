"""From heatmaps to keypoints, all instances at once, on the device where the heatmaps are.

Legend: N instances, K keypoints, h, w height and width of a heatmap in cells. Coordinates are cells, x before y.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from eval.vitpose.crops import Codec

BLUR_KERNEL = 11
"""Width of DARK's blur in cells for heatmaps trained with sigma 2 (mmpose's ``UDPHeatmap``)."""
_LOG_FLOOR, _LOG_CEILING = 1e-3, 50.0
_HESSIAN_EPSILON = torch.finfo(torch.float32).eps


def decode(heatmaps: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Keypoints (N, K, 2) and their scores (N, K), the maxima, of float32 heatmaps (N, K, h, w).

    A heatmap without a positive value has no keypoint: (-1, -1).
    """
    w = heatmaps.shape[3]
    scores, flat = heatmaps.flatten(2).max(dim=2)
    peaks = torch.stack([flat % w, flat // w], dim=-1)
    refine = _towards_second_maximum if codec == "msra" else _distribution_aware
    keypoints = peaks + refine(heatmaps, peaks)
    return torch.where(scores[..., None] > 0, keypoints, -1.0), scores


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
    """DARK (Zhang et al., CVPR 2020) as UDP uses it: one Newton step on the logarithm of the blurred heatmap."""
    blurred = _blur(heatmaps)
    blurred = blurred * (heatmaps.amax((2, 3), keepdim=True) / blurred.amax((2, 3), keepdim=True))
    log = _neighbourhoods(blurred, peaks).nan_to_num().clamp(_LOG_FLOOR, _LOG_CEILING).log()
    centre = log[..., 1, 1]
    gradient = 0.5 * torch.stack([log[..., 1, 2] - log[..., 1, 0], log[..., 2, 1] - log[..., 0, 1]], dim=-1)
    xx = log[..., 1, 2] - 2 * centre + log[..., 1, 0] + _HESSIAN_EPSILON
    yy = log[..., 2, 1] - 2 * centre + log[..., 0, 1] + _HESSIAN_EPSILON
    xy = 0.5 * (
        log[..., 2, 2] - log[..., 1, 2] - log[..., 2, 1] + 2 * centre
        - log[..., 1, 0] - log[..., 0, 1] + log[..., 0, 0]
    )  # fmt: skip
    dx, dy = gradient.unbind(-1)
    determinant = xx * yy - xy * xy
    step = torch.stack([yy * dx - xy * dy, xx * dy - xy * dx], dim=-1) / determinant[..., None]
    return -step


def _blur(heatmaps: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with zeros outside; the sigma is what cv2.GaussianBlur takes for the kernel's width."""
    sigma = 0.3 * ((BLUR_KERNEL - 1) * 0.5 - 1) + 0.8
    offsets = torch.arange(BLUR_KERNEL, dtype=torch.float64) - BLUR_KERNEL // 2
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(heatmaps)
    maps = heatmaps.flatten(0, 1)[:, None]
    maps = F.conv2d(maps, kernel.view(1, 1, 1, -1), padding=(0, BLUR_KERNEL // 2))
    maps = F.conv2d(maps, kernel.view(1, 1, -1, 1), padding=(BLUR_KERNEL // 2, 0))
    return maps.view_as(heatmaps)


def _neighbourhoods(heatmaps: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """(N, K, 3, 3) values around each peak, rows y - 1 to y + 1; border values repeat outside."""
    h, w = heatmaps.shape[2:]
    steps = torch.arange(-1, 2, device=heatmaps.device)
    x = (peaks[..., 0, None] + steps).clamp(0, w - 1)
    y = (peaks[..., 1, None] + steps).clamp(0, h - 1)
    cells = (y[..., :, None] * w + x[..., None, :]).flatten(2)
    return heatmaps.flatten(2).gather(2, cells).unflatten(2, (3, 3))
