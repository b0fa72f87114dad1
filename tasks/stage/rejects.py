"""Records that cannot be used: how many a build allows, and the error when there are more, with examples."""

from __future__ import annotations

import itertools
import math
import operator
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import Any

import luigi

from spctrl.errors import ExpectedError
from spctrl.output.printable import one_line
from spctrl.store.provenance import REJECTS
from spctrl.store.runs import Run
from tasks.settings import OfSettings

MAX_REASONS, MIN_EXAMPLES, MAX_EXAMPLE_CHARACTERS = 5, 3, 400
"""Of rejects, in an error message."""


class TooManyRejectsError(ExpectedError):
    """More records were rejected than the settings allow."""


def _share(name: str, default: float, description: str) -> Any:
    """A setting of [build] from 0 to 1."""
    return luigi.NumericalParameter(
        default=default,
        var_type=float,
        min_value=0.0,
        max_value=1.0,
        right_op=operator.le,
        config_path={"section": "build", "name": name},
        description=description,
    )


class MeetsBadRecords(OfSettings):
    """A task that says what becomes of records that cannot be used."""

    on_bad_record = luigi.ChoiceParameter(
        default="quarantine",
        choices=["quarantine", "fail"],
        config_path={"section": "build", "name": "on_bad_record"},
        description="quarantine: set bad records aside; fail: stop the build",
    )
    max_reject_share = _share("max_reject_share", 0.05, "share of bad records above which the build fails")
    max_unassigned_share = _share(
        "max_unassigned_share",
        0.0,
        "share of annotations of no image of the file, above which the build fails: any image may lack one of them",
    )


def reject_examples(run: Run) -> str:
    """The commonest reasons among a run's rejects, with examples, as an addition to an error message."""
    from spctrl.io.parquet import read_table

    rows = read_table(run.path(REJECTS)).to_pylist()
    if not rows:
        return ""
    counts = Counter(row["code"] for row in rows).most_common(MAX_REASONS)
    each = math.ceil(MIN_EXAMPLES / len(counts))
    lines = []
    for code, count in counts:
        lines.append(f"\n  {code} ({count:,}):")
        examples = itertools.islice((row for row in rows if row["code"] == code), each)
        lines += [f"\n    {_format_reject(row)}" for row in examples]
    return f". Rejected, with examples:{''.join(lines)}\nAll of them: {run.place(REJECTS)}"


def _format_reject(reject: Mapping[str, Any]) -> str:
    image_id, file_name = reject["image_id"], reject["file_name"]
    of_image = "" if image_id is None else f"image {image_id}{f' ({file_name})' if file_name else ''}: "
    message = textwrap.shorten(reject["message"], MAX_EXAMPLE_CHARACTERS, placeholder=" ...")
    return one_line(f"{of_image}{message.removeprefix(f'image {image_id}: ')}")
