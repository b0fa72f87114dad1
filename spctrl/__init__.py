"""The library: records, skeletons, rendering and image checks. It knows nothing of Luigi."""

__version__ = "0.1.0"
