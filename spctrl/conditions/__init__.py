"""Conditioning images: spatext index maps, OpenPose-style renders, keypoint heatmaps, masks and depth."""
