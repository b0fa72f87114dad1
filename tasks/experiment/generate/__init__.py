"""Stages that generate images of poses: prompts, samples, and the folder that shows them."""
