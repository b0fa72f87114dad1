"""Stages from raw annotations to the manifest, its export and its report."""
