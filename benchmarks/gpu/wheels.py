"""Download what a GPU machine without a network is missing: ``python -m benchmarks.gpu.wheels FOLDER``.

There: ``python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl``, then with SITE on ``PYTHONPATH``,
``python3 -m benchmarks gpu --out OUT`` in the source tree.
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.common import ROOT

REQUIREMENTS = Path(__file__).parent.parent / "gpu_requirements.txt"
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
MOST_MB = 64
PRESENT = {
    "certifi", "filelock", "huggingface-hub", "idna", "numpy", "pillow", "python-dateutil", "regex", "safetensors",
    "timm", "torch", "torchvision", "tqdm", "typing-extensions", "urllib3", "zipp",
}  # fmt: skip
"""Packages of the machine's image that those in the folder need."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where all is there and fits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
            "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms,
            "--dest", str(folder), "--requirement", str(REQUIREMENTS),
        ],
        check=True,
    )  # fmt: skip
    wheels = sorted(folder.glob("*.whl"))
    if missing := missing_packages(wheels):
        print(
            f"expected all packages that the wheels need, found no {', '.join(missing)}. Add them to {REQUIREMENTS}",
            file=sys.stderr,
        )
        return 1
    wheels_mb, tree_mb = (_megabytes(files) for files in (wheels, _source_tree()))
    print(f"{len(wheels)} wheels for Python {PYTHON}: {wheels_mb:.1f} MB; source tree: {tree_mb:.1f} MB")
    if wheels_mb + tree_mb > MOST_MB:
        print(f"expected at most {MOST_MB} MB, found {wheels_mb + tree_mb:.1f} MB", file=sys.stderr)
        return 1
    return 0


def missing_packages(wheels: Sequence[Path]) -> list[str]:
    """Packages that wheels need and that are neither among them nor on the machine."""
    metadata = [_metadata(wheel) for wheel in wheels]
    there = {canonicalize_name(each["Name"]) for each in metadata} | PRESENT
    environment = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "extra": "",
    }
    needed = [Requirement(text) for each in metadata for text in each.get_all("Requires-Dist", [])]
    return sorted(
        {
            each.name
            for each in needed
            if (each.marker is None or each.marker.evaluate(environment))
            and canonicalize_name(each.name) not in there
        }
    )


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def _source_tree() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name]


def _megabytes(files: Sequence[Path]) -> float:
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
