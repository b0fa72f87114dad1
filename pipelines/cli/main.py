"""The ``spctrl`` command. Building is Luigi's."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import spctrl
from pipelines import luigi_setup
from pipelines.cli import cluster, doctor, pose, store
from spctrl import options
from spctrl.errors import ExpectedError
from spctrl.extras import imports_explained
from spctrl.io.disk_errors import writing
from spctrl.output.console import PlainConsole
from spctrl.output.printable import one_line
from spctrl.output.secrets import masked
from spctrl.output.terminal import say_message

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Commands(TyperGroup):
    """Commands that show the message of an error that explains itself, not its traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _printable_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _printable_usage_errors(), imports_explained():
                return super().invoke(ctx)
        except ExpectedError as error:
            say_message(str(error))
            raise typer.Exit(FAILED) from None


_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def _printable_usage_errors() -> Iterator[None]:
    """Typer prints its own errors, whose messages may quote anything, in lines that may part a secret."""
    try:
        yield
    except _UsageError as error:
        error.message = one_line(masked(error.message))
        raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # luigi_setup.show_error shows them
)


for group in (store, doctor, pose, cluster):
    group.add_to(app)


console = PlainConsole()

FAILED = 1


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"spctrl {spctrl.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Look at what is built and why it would be built again, check and clean the store, draw a sample.

    Settings come from luigi.cfg and LUIGI_CONFIG_PATH, as for luigi itself.
    """
    luigi_setup.configure()


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(parser=options.path, help="where AP-10K/ and HumanArt/ go")],
    images_per_split: Annotated[int, typer.Option(min=1, help="images of each dataset's train and val")] = 12,
    seed: Annotated[int, typer.Option(help="another seed draws other scenes")] = 0,
) -> None:
    """Draw a small dataset in both raw formats, with exact masks and depth maps beside the images."""
    from spctrl.demo_data import write_sample

    with writing(folder):
        write_sample(folder, images_per_split=images_per_split, seed=seed)
    console.say(f"Drew {4 * images_per_split} images into {folder}/AP-10K and {folder}/HumanArt.")


@app.command()
def tiny_weights(
    folder: Annotated[Path, typer.Argument(parser=options.path, help="for [paths] weights")],
) -> None:
    """Write very small models with random weights, in the formats of the real ones, to try the pipeline with.

    Whatever is made with them says `weights: random`.
    """
    import eval.tiny
    import eval.vitpose.tiny
    import spctrl.image_models.tiny

    with writing(folder):
        for module in (spctrl.image_models.tiny, eval.tiny, eval.vitpose.tiny):
            for name, path in module.write_tiny_weights(folder):
                console.say(f"{name}: {path}")
