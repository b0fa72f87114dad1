"""Datasets, skeletons, annotations and images: from raw files to records, the index and the manifest."""
