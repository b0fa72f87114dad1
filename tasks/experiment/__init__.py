"""Stages that train, generate, evaluate and make the benchmark's tables and report."""
