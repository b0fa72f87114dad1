"""The training objective's terms (REFERENCE section 10)."""

from spctrl.losses.denoising import denoising_loss
from spctrl.losses.keypoint_concept import keypoint_concept_loss

__all__ = ["denoising_loss", "keypoint_concept_loss"]
