"""The store: artifacts in packs, the runs of stages, and what identifies both. Knows nothing of Luigi."""
