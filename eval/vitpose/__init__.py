"""ViTPose: weights of three formats, crops, decoding. ``eval.pose_estimator`` puts them together."""
