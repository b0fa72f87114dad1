"""One Luigi task for each stage, and what runs it."""
