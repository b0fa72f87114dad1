"""Drawing keypoints: spatext index maps, OpenPose-style renders and keypoint heatmaps."""
