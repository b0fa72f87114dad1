"""``python -m benchmarks gpu``: is every network stage right on a GPU, and how fast, within a time budget."""
