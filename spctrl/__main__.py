"""``python -m spctrl``: the ``spctrl`` command."""

from pipelines.cli import app

app(prog_name="spctrl")
