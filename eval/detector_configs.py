"""Configuration files of mmdet and mmpose: which files one is made of."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spctrl.configuration import read_yaml
from spctrl.errors import ExpectedError

BASE = "_base_"


def configuration_files(path: Path) -> list[Path]:
    """A configuration file and all files below its ``_base_`` and its relative imports, in the order they are met.

    Names that lead to no file, such as ``mmdet::...``, are left out: they are of an installed package.
    """
    found: dict[Path, None] = {}
    waiting = [path.resolve()]
    while waiting:
        if (each := waiting.pop(0)) not in found:
            found[each] = None
            waiting += [base for name in _bases(each) if (base := (each.parent / name).resolve()).is_file()]
    return list(found)


def _bases(path: Path) -> Iterator[str]:
    """Paths, relative to a configuration file, of those that it is based on; none where it cannot be parsed."""
    try:
        if path.suffix == ".py":
            yield from _python_bases(ast.parse(path.read_text()))
        elif path.suffix in (".json", ".yaml", ".yml"):  # JSON is YAML
            values = read_yaml(path)
            yield from _texts(values.get(BASE)) if isinstance(values, dict) else ()
    except (OSError, ValueError, SyntaxError, RecursionError, ExpectedError):
        return  # whoever uses it says what is wrong with it


def _python_bases(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:  # within `with read_base():`
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ("../" * (node.level - 1) + f"{module.replace('.', '/')}.py" for module in modules)
        elif isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == BASE for target in node.targets
        ):
            constants = (each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant))
            yield from (each for each in constants if isinstance(each, str))


def _texts(value: Any) -> list[str]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
