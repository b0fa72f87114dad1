"""Conditions computed by image models: instance masks, depth maps, latents."""
