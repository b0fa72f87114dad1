"""Benchmarks: this project against plain ways of doing the same, side by side. ``python -m benchmarks --help``."""
