"""What counts as a stage's code: everything its function reaches, and nothing that cannot change what it does."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

import tasks
from spctrl.store.code_version import PACKAGES, ROOT, code_components
from tasks.stage.base import StageTask

FUNCTION = "spctrl.stage:work"


class Project:
    """A small project on disk, whose files can be edited."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(dedent(text))

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
        (self.root / path).write_text(text.replace(old, new))

    def components(self, function: str = FUNCTION) -> dict[str, str]:
        return code_components(function, self.root)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """``work`` reaches definitions of five modules in many ways; ``unreached`` ones lie beside each."""
    found = Project(tmp_path)
    for package in ("spctrl", "tasks"):
        found.write(f"{package}/__init__.py", "")
    found.write(
        "spctrl/stage.py",
        '''\
        """The stage."""

        import math
        from dataclasses import dataclass
        from functools import cache

        import spctrl.tools as tools
        from spctrl.parts import reexported
        from spctrl.shapes import Circle, decorated

        RADIUS = 4
        UNREACHED = 5


        @dataclass
        class Options:
            """What can be set."""

            radius: int = RADIUS
            """In pixels."""


        @decorated
        def work(number: int, *, factor: float = tools.FACTOR) -> float:
            """Work."""
            # a comment
            shape: Circle = Circle(number)
            return shape.area() * factor + tools.helper(number) + reexported() + late() + rooted(number)


        def late() -> int:
            from spctrl.late import something

            return something()


        def rooted(number: int) -> float:
            return math.sqrt(number) + Options().radius


        @cache
        def unreached() -> int:
            return UNREACHED
        ''',
    )
    found.write(
        "spctrl/tools.py",
        """\
        from .deep import deeper

        FACTOR = 2
        TABLE = {}
        TABLE["x"] = 1


        def helper(number):
            return deeper(number) + len(TABLE)


        def unreached():
            return 1
        """,
    )
    found.write("spctrl/deep.py", "def deeper(x):\n    return x + DEPTH\n\n\nDEPTH = 3\nUNREACHED = 4\n")
    found.write(
        "spctrl/shapes.py",
        """\
        import numpy as np


        class Shape:
            scale = 1

            def area(self):
                return self.scale * self.size()


        class Circle(Shape):
            size_px: int

            def __init__(self, radius):
                self.radius = radius

            def size(self):
                return np.pi * self.radius ** 2


        class Square(Shape):
            def size(self):
                return 1


        def decorated(function):
            return function
        """,
    )
    found.write("spctrl/parts/__init__.py", "from spctrl.parts.inner import original as reexported\n")
    found.write(
        "spctrl/parts/inner.py", "def original():\n    return 7\n\n\ndef unreached():\n    return 8\n"
    )
    found.write("spctrl/late.py", "def something():\n    return 9\n\n\ndef unreached():\n    return 10\n")
    return found


def test_all_that_is_reached_is_listed_and_nothing_else(project: Project) -> None:
    assert list(project.components()) == [
        "spctrl.deep:DEPTH",
        "spctrl.deep:deeper",
        "spctrl.late:something",
        "spctrl.parts.inner:original",
        "spctrl.shapes:Circle",
        "spctrl.shapes:Shape",
        "spctrl.shapes:decorated",
        "spctrl.stage:Options",
        "spctrl.stage:RADIUS",
        "spctrl.stage:late",
        "spctrl.stage:rooted",
        "spctrl.stage:work",
        "spctrl.tools:FACTOR",
        "spctrl.tools:TABLE",
        "spctrl.tools:helper",
    ]


def test_two_looks_give_the_same(project: Project) -> None:
    assert project.components() == project.components()


HARMLESS = {
    "comment": ("spctrl/stage.py", "# a comment", "# another one"),
    "no comment": ("spctrl/stage.py", "    # a comment\n", ""),
    "docstring of a function": ("spctrl/stage.py", '"""Work."""', '"""Work harder."""'),
    "no docstring": ("spctrl/stage.py", '    """Work."""\n', ""),
    "docstring of a class": ("spctrl/stage.py", '"""What can be set."""', '"""Settings."""'),
    "docstring of an attribute": ("spctrl/stage.py", '"""In pixels."""', '"""Pixels."""'),
    "docstring of a module": ("spctrl/stage.py", '"""The stage."""', '"""A stage."""'),
    "new docstring": ("spctrl/tools.py", "def helper(number):\n", 'def helper(number):\n    """Help."""\n'),
    "annotation of an argument": ("spctrl/stage.py", "number: int, *", "number: float, *"),
    "annotation of a result": (
        "spctrl/stage.py",
        "factor: float = tools.FACTOR) -> float",
        "factor=tools.FACTOR)",
    ),
    "annotation of a variable": ("spctrl/stage.py", "shape: Circle =", "shape ="),
    "formatting": ("spctrl/deep.py", "x + DEPTH", "(\n        x\n        +   DEPTH\n    )"),
    "quotes": ("spctrl/tools.py", 'TABLE["x"]', "TABLE['x']"),
    "empty lines": ("spctrl/deep.py", "\n\n\nDEPTH", "\n\n\n\n\nDEPTH"),
    "an unreached function": ("spctrl/stage.py", "return UNREACHED", "return 1"),
    "an unreached constant": ("spctrl/deep.py", "UNREACHED = 4", "UNREACHED = 5"),
    "an unreached class": ("spctrl/shapes.py", "        return 1\n", "        return 2\n"),
    "an unreached neighbour of a re-export": ("spctrl/parts/inner.py", "return 8", "return 9"),
    "an unreached neighbour of a late import": ("spctrl/late.py", "return 10", "return 11"),
    "a new function": ("spctrl/deep.py", "UNREACHED = 4", "UNREACHED = 4\n\n\ndef new():\n    return 1"),
    "an unused import": ("spctrl/deep.py", "def deeper", "import os\n\n\ndef deeper"),
    "an import for types": (
        "spctrl/deep.py",
        "def deeper",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from spctrl.late import unreached\n\n\ndef deeper",
    ),
}


@pytest.mark.parametrize(("path", "old", "new"), HARMLESS.values(), ids=HARMLESS.keys())
def test_what_cannot_change_the_result_does_not_count(
    project: Project, path: str, old: str, new: str
) -> None:
    before = project.components()
    project.edit(path, old, new)
    assert project.components() == before


# (file, before, after, what counts as changed)
TELLING = {
    "the function": ("spctrl/stage.py", "* factor +", "* factor -", "spctrl.stage:work"),
    "a helper's helper": ("spctrl/deep.py", "x + DEPTH", "x - DEPTH", "spctrl.deep:deeper"),
    "a constant": ("spctrl/deep.py", "DEPTH = 3", "DEPTH = 30", "spctrl.deep:DEPTH"),
    "a method": ("spctrl/shapes.py", "self.radius ** 2", "self.radius ** 3", "spctrl.shapes:Circle"),
    "a base class": ("spctrl/shapes.py", "scale = 1", "scale = 2", "spctrl.shapes:Shape"),
    "a decorator": ("spctrl/shapes.py", "return function", "return print", "spctrl.shapes:decorated"),
    "the use of a decorator": ("spctrl/stage.py", "@decorated\n", "", "spctrl.stage:work"),
    "a default argument": ("spctrl/tools.py", "FACTOR = 2", "FACTOR = 3", "spctrl.tools:FACTOR"),
    "an argument's default in place": ("spctrl/stage.py", "= tools.FACTOR", "= 2", "spctrl.stage:work"),
    "a statement on import": ("spctrl/tools.py", 'TABLE["x"] = 1', 'TABLE["x"] = 2', "spctrl.tools:helper"),
    "a new statement on import": ("spctrl/deep.py", "DEPTH = 3", "DEPTH = 3\nprint()", "spctrl.deep:deeper"),
    "a re-export's origin": ("spctrl/parts/inner.py", "return 7", "return 70", "spctrl.parts.inner:original"),
    "a function-level import's": ("spctrl/late.py", "return 9", "return 90", "spctrl.late:something"),
    "a dataclass's field": ("spctrl/stage.py", "radius: int =", "radius: float =", "spctrl.stage:Options"),
    "a class body's annotation": (
        "spctrl/shapes.py",
        "size_px: int",
        "size_px: float",
        "spctrl.shapes:Circle",
    ),
    "a dataclass's default": ("spctrl/stage.py", "RADIUS = 4", "RADIUS = 5", "spctrl.stage:RADIUS"),
    "a library's function": ("spctrl/stage.py", "import math", "import cmath as math", "spctrl.stage:rooted"),
    "a library": ("spctrl/shapes.py", "numpy as np", "torch as np", "spctrl.shapes:Circle"),
    "a second definition": (
        "spctrl/deep.py",
        "UNREACHED = 4",
        "UNREACHED = 4\n\n\ndef deeper(x):\n    return 0",
        "spctrl.deep:deeper",
    ),
    "a constant changed in place": ("spctrl/deep.py", "UNREACHED = 4", "DEPTH += 4", "spctrl.deep:DEPTH"),
}


@pytest.mark.parametrize(("path", "old", "new", "changed"), TELLING.values(), ids=TELLING.keys())
def test_what_can_change_the_result_counts(
    project: Project, path: str, old: str, new: str, changed: str
) -> None:
    before = project.components()
    project.edit(path, old, new)
    after = project.components()
    assert after != before
    assert after.get(changed) != before[changed]


def test_a_re_export_from_elsewhere_counts(project: Project) -> None:
    before = project.components()
    project.edit("spctrl/parts/__init__.py", "original as", "unreached as")
    after = project.components()
    assert after.keys() - before.keys() == {"spctrl.parts.inner:unreached"}
    assert before.keys() - after.keys() == {"spctrl.parts.inner:original"}


def test_moving_a_re_exported_function_through_another_package_changes_nothing(project: Project) -> None:
    before = project.components()
    project.edit("spctrl/stage.py", "from spctrl.parts import", "from spctrl.parts.inner import original as")
    assert project.components() == before


def test_what_a_package_does_on_import_counts(project: Project) -> None:
    before = project.components()
    project.write("spctrl/__init__.py", "import os\n\nos.environ['X'] = '1'\n")
    with_effect = project.components()
    assert with_effect.keys() - before.keys() == {"spctrl:<import>"}
    project.edit("spctrl/__init__.py", "'1'", "'2'")
    assert project.components() != with_effect


# Ways to refer to something: (the stage's file, whether an edit to spctrl.other:used and :unused must count)

WAYS = {
    "from import": ("from spctrl.other import used\n\n\ndef work():\n    return used()\n", False),
    "from import as": ("from spctrl.other import used as u\n\n\ndef work():\n    return u()\n", False),
    "import": ("import spctrl.other\n\n\ndef work():\n    return spctrl.other.used()\n", False),
    "import as": ("import spctrl.other as o\n\n\ndef work():\n    return o.used()\n", False),
    "module from package": ("from spctrl import other\n\n\ndef work():\n    return other.used()\n", False),
    "relative": ("from .other import used\n\n\ndef work():\n    return used()\n", False),
    "relative module": ("from . import other\n\n\ndef work():\n    return other.used()\n", False),
    "relative function-level": ("def work():\n    from .other import used\n\n    return used()\n", False),
    "function-level module": ("def work():\n    import spctrl.other as o\n\n    return o.used()\n", False),
    "in a try": (
        "try:\n    from spctrl.other import used\nexcept ImportError:\n    used = None\n\n\n"
        "def work():\n    return used()\n",
        False,
    ),
    "first of two": (
        "try:\n    from spctrl.other import used\nexcept ImportError:\n    from spctrl.more import used\n\n\n"
        "def work():\n    return used()\n",
        False,
    ),
    "under a condition": (
        "import sys\n\nif sys.flags.debug:\n    from spctrl.other import used\nelse:\n    used = None\n\n\n"
        "def work():\n    return used()\n",
        False,
    ),
    "type checking with else": (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from spctrl.more import used\nelse:\n"
        "    from spctrl.other import used\n\n\ndef work():\n    return used()\n",
        False,
    ),
    "local name as global name": (
        "def used():\n    return 0\n\n\ndef work():\n    from spctrl.other import used\n\n    return used()\n",
        False,
    ),
    "attribute of an attribute": (
        "import spctrl.other\n\n\ndef work():\n    return spctrl.other.used.__name__\n",
        False,
    ),
    "not called": (
        "from spctrl.other import used\n\nTABLE = {'x': used}\n\n\ndef work():\n    return TABLE\n",
        False,
    ),
    "keyword": ("from spctrl.other import used\n\n\ndef work():\n    return sorted([], key=used)\n", False),
    "lambda": ("from spctrl.other import used\n\nwork = lambda: used()\n", False),
    "nested function": (
        "from spctrl.other import used\n\n\ndef work():\n    def inner():\n        return used()\n",
        False,
    ),
    "comprehension": (
        "from spctrl.other import used\n\n\ndef work():\n    return [used() for _ in ()]\n",
        False,
    ),
    "f-string": ("from spctrl.other import used\n\n\ndef work():\n    return f'{used()}'\n", False),
    "with": ("from spctrl.other import used\n\n\ndef work():\n    with used():\n        pass\n", False),
    "async": ("from spctrl.other import used\n\n\nasync def work():\n    await used()\n", False),
    "match": (
        "from spctrl import other\n\n\ndef work(x):\n    match x:\n        case other.used:\n            return 1\n",
        False,
    ),
    "annotation of a class body": ("from spctrl.other import used\n\n\nclass work:\n    x: used\n", False),
    "statement on import": (
        "from spctrl.other import used\n\nused()\n\n\ndef work():\n    return 1\n",
        False,
    ),
    "star": ("from spctrl.other import *\n\n\ndef work():\n    return used()\n", True),
    "one of two stars": (
        "from spctrl.other import *\nfrom spctrl.more import *\n\n\ndef work():\n    return used()\n",
        True,
    ),
    "star of a package": ("from spctrl.pack import *\n\n\ndef work():\n    return used()\n", False),
    "module as a value": (
        "from spctrl import other\n\n\ndef work():\n    return getattr(other, 'us' + 'ed')()\n",
        True,
    ),
    "module as a value, as": ("import spctrl.other as o\n\n\ndef work():\n    return vars(o)\n", True),
    "package as a value": ("import spctrl.pack as p\n\n\ndef work():\n    return vars(p)['used']()\n", False),
    "name made on import": ("from spctrl.other import made\n\n\ndef work():\n    return made\n", True),
}


@pytest.mark.parametrize(("stage", "whole_module"), WAYS.values(), ids=WAYS.keys())
def test_each_way_to_refer_to_something_is_followed(project: Project, stage: str, whole_module: bool) -> None:
    project.write("spctrl/stage.py", stage)
    project.write("spctrl/more.py", "def other():\n    return 0\n\n\ndef used():\n    return 0\n")
    project.write("spctrl/pack/__init__.py", "from spctrl.other import used\n")
    project.write(
        "spctrl/other.py",
        "def used():\n    return inner()\n\n\ndef inner():\n    return 1\n\n\ndef unused():\n    return 2\n\n\n"
        "globals()['made'] = 3\n",
    )
    before = project.components()
    project.edit("spctrl/other.py", "return 1", "return 100")
    changed = project.components()
    assert changed != before
    project.edit("spctrl/other.py", "return 2", "return 200")
    assert (project.components() != changed) is whole_module


def test_a_relative_import_out_of_a_package_is_followed(project: Project) -> None:
    project.write("spctrl/stage.py", "from .pack.inner.leaf import work\n")
    project.write("spctrl/pack/inner/__init__.py", "from ..base import value\n")
    project.write("spctrl/pack/__init__.py", "")
    project.write("spctrl/pack/base.py", "value = 1\n")
    project.write(
        "spctrl/pack/inner/leaf.py",
        "from . import value\nfrom ... import top\n\n\ndef work():\n    return value\n",
    )
    before = project.components("spctrl.pack.inner.leaf:work")
    assert "spctrl.pack.base:value" in before
    project.edit("spctrl/pack/base.py", "1", "2")
    assert project.components("spctrl.pack.inner.leaf:work") != before


def test_packages_without_an_init_file_are_followed(project: Project) -> None:
    project.write(
        "spctrl/stage.py", "from spctrl.space.inner import used\n\n\ndef work():\n    return used\n"
    )
    project.write("spctrl/space/inner.py", "used = 1\n")
    assert "spctrl.space.inner:used" in project.components()


CYCLES: dict[str, Callable[[Project], None]] = {
    "two modules": lambda p: (
        p.write("spctrl/stage.py", "from spctrl import b\n\n\ndef work():\n    return b.other()\n"),
        p.write("spctrl/b.py", "from spctrl import stage\n\n\ndef other():\n    return stage.work()\n"),
    ),
    "modules as values": lambda p: (
        p.write("spctrl/stage.py", "from spctrl import b\n\n\ndef work():\n    return vars(b)\n"),
        p.write("spctrl/b.py", "from spctrl import stage\n\n\ndef other():\n    return vars(stage)\n"),
    ),
    "recursion": lambda p: p.write("spctrl/stage.py", "def work():\n    return work()\n"),
    "a re-export of itself": lambda p: (
        p.write("spctrl/stage.py", "from spctrl.pack import gone\n\n\ndef work():\n    return gone()\n"),
        p.write("spctrl/pack/__init__.py", "from . import gone\n"),
    ),
    "re-exports of each other": lambda p: (
        p.write("spctrl/stage.py", "from spctrl.b import x\n\n\ndef work():\n    return x\n"),
        p.write("spctrl/b.py", "from spctrl.c import x\n"),
        p.write("spctrl/c.py", "from spctrl.b import x\n"),
    ),
    "stars of each other": lambda p: (
        p.write("spctrl/stage.py", "from spctrl.b import *\n\n\ndef work():\n    return x\n"),
        p.write("spctrl/b.py", "from spctrl.stage import *\n"),
    ),
}


@pytest.mark.parametrize("write", CYCLES.values(), ids=CYCLES.keys())
def test_cycles_come_to_an_end(project: Project, write: Callable[[Project], None]) -> None:
    write(project)
    assert FUNCTION in project.components()


@pytest.mark.parametrize(
    "function",
    ["spctrl.stage:gone", "spctrl.gone:work", "numpy:zeros", "spctrl.stage", "spctrl.stage:", ":work", ""],
)
def test_an_unknown_name_is_an_error_that_names_it(project: Project, function: str) -> None:
    with pytest.raises(LookupError, match="expected a definition") as caught:
        project.components(function)
    assert repr(function.partition(":")[2]) in str(caught.value)


def test_packages_of_others_are_not_followed(project: Project) -> None:
    project.write("other/tool.py", "def used():\n    return 1\n")
    project.write("spctrl/stage.py", "from other.tool import used\n\n\ndef work():\n    return used()\n")
    before = project.components()
    project.edit("other/tool.py", "1", "2")
    assert project.components() == before == {FUNCTION: before[FUNCTION]}


# This project


def stages() -> list[type[StageTask]]:
    for module in pkgutil.walk_packages(tasks.__path__, "tasks."):
        importlib.import_module(module.name)
    found: list[type[StageTask]] = []
    waiting: list[type[StageTask]] = [StageTask]
    while waiting:
        for each in waiting.pop().__subclasses__():
            waiting.append(each)
            if "function" in vars(each) and each.__module__.startswith("tasks.") and each not in found:
                found.append(each)
    return found


def test_no_stage_runs_again_because_the_store_changes() -> None:
    """Least of all a training, which takes days."""
    parts = ("runs", "provenance", "format", "store")
    of_store = tuple(f"spctrl.store.{part}:" for part in parts)
    for stage in stages():
        for function in (stage.function, *stage.also_reaches):
            reached = [name for name in code_components(function) if name.startswith(of_store)]
            assert reached == [], f"{stage.__name__} reaches {reached}"


def test_the_stages_are_found() -> None:
    names = {getattr(each, "stage", None) for each in stages()}  # some are bases of several
    assert {
        "index",
        "images",
        "spatext",
        "openpose",
        "mask",
        "depth",
        "manifest",
        "export",
        "report",
    } <= names


@pytest.mark.parametrize("stage", stages(), ids=lambda stage: stage.__name__)
def test_every_real_stages_code_is_found(stage: type[StageTask]) -> None:
    for function in (stage.function, *stage.also_reaches):
        components = code_components(function)
        assert function in components
        # A whole module would make many edits count that change nothing.
        assert not [name for name in components if name.endswith(":*")]


def test_every_real_stages_code_is_found_quickly() -> None:
    started = time.perf_counter()
    code_components("spctrl.data.index:write_index")
    assert time.perf_counter() - started < 2


def test_a_real_render_reaches_what_it_draws_with_and_no_more() -> None:
    components = code_components("spctrl.conditions.openpose:render_openpose")
    assert {
        "spctrl.conditions.spatext:link_polygon",
        "spctrl.conditions.png:Canvas",
        "spctrl.conditions.openpose:WHEEL",
    } <= components.keys()
    assert {name.split(":")[0] for name in components} == {
        "spctrl.conditions.openpose",
        "spctrl.conditions.png",
        "spctrl.conditions.spatext",
    }


def test_the_packages_that_count_are_those_of_the_project() -> None:
    assert all((ROOT / package / "__init__.py").is_file() for package in PACKAGES)
