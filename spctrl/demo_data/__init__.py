"""A drawn sample of both raw datasets: real formats, invented pictures, exact truth."""

from __future__ import annotations

from spctrl.demo_data.writer import write_sample

__all__ = ["write_sample"]
