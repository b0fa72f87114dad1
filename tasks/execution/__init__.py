"""How a stage's batches are worked on: processes of this machine or a Ray cluster, progress and log lines."""
