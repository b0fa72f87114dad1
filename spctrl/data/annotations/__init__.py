"""Annotation files in COCO keypoint format: AP-10K's and HumanArt's."""
