"""``python -m spctrl``: the ``spctrl`` command."""

from pipelines.cli.main import app

app(prog_name="spctrl")
