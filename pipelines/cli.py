"""The ``spctrl`` command."""
import typer
app = typer.Typer()
