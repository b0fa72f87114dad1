"""What a stage's code is: the functions, classes and constants of this project that its function reaches.

Found by reading syntax trees, so nothing heavy is imported. Comments, docstrings, annotations and formatting
do not count, except annotations of class bodies, which decide what a dataclass or a decoder does. Where a
reference cannot be resolved to one definition, the whole module counts: rather one run too many than a stale
result. What no name leads to is not found: a function that is registered by another module's import, or named
by a text.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("spctrl", "eval", "tasks", "pipelines")
WHOLE_MODULE = "*"
ON_IMPORT = "<import>"
"""In place of a name: what a package does when it is imported."""

Alias = tuple[str, str | None]
"""A module and a name in it; the name is None where the module itself is bound."""


def copy_code(folder: Path) -> None:
    """Copy this project's packages, and nothing else, into a folder."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def code_components(function: str, root: Path = ROOT) -> dict[str, str]:
    """Digest of every definition that ``function`` reaches.

    Args:
        function: ``"package.module:name"`` of a function, class or constant of this project.
        root: the folder that holds the packages.

    Returns:
        ``{"package.module:name": digest}``, sorted; the function itself included.

    Raises:
        LookupError: there is no such definition.
    """
    sources = _Sources(root)
    module, _, name = function.partition(":")
    if (found := sources.module(module)) is None or name not in found.definitions:
        raise LookupError(f"expected a definition {name!r} in module {module} below {root}, found none")
    reached: dict[str, str] = {}
    waiting = [(module, name)]
    while waiting:
        module, name = waiting.pop()
        if (reference := f"{module}:{name}") in reached:
            continue
        found = sources.module(module)
        if found is None:
            continue
        waiting += sources.packages_with_effects(module)
        if name == WHOLE_MODULE:
            reached[reference] = _digest(found.tree.body)
            waiting += [(module, each) for each in found.definitions]
            waiting += sources.aliased(found).found
            continue
        statements = [*found.effects, *found.definitions.get(name, ())]
        references = sources.references(found, statements)
        reached[reference] = _digest(statements, references.external)
        waiting += references.found
    return dict(sorted(reached.items()))


@dataclass
class _Module:
    """One source file: what it defines, what it imports, and its statements that act on import."""

    name: str
    is_package: bool
    tree: ast.Module
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    aliases: dict[str, list[Alias]] = field(default_factory=dict)
    effects: list[ast.stmt] = field(default_factory=list)

    def __post_init__(self) -> None:
        for statement in self.tree.body:
            self._sort_in(statement)

    def _sort_in(self, statement: ast.stmt) -> None:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                self.definitions.setdefault(statement.name, []).append(statement)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                self._sort_assignment(statement)
            case ast.Import() | ast.ImportFrom():
                self.add_imports(statement, self.aliases)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]) | ast.Expr(value=ast.Constant()):
                pass
            case _:  # such as a try around an import, which may also be a re-export
                self.effects.append(statement)
                self.add_imports(statement, self.aliases)

    def _sort_assignment(self, statement: ast.stmt) -> None:
        stored = [n for n in ast.walk(statement) if isinstance(getattr(n, "ctx", None), ast.Store)]
        names = {node.id for node in stored if isinstance(node, ast.Name)}
        for name in names:
            self.definitions.setdefault(name, []).append(statement)
        # Such as TABLE["x"] = 1, which changes what another statement defined.
        if any(isinstance(node, ast.Subscript | ast.Attribute) for node in stored):
            self.effects.append(statement)

    def add_imports(self, tree: ast.AST, aliases: dict[str, list[Alias]]) -> None:
        """Add what the imports within a tree bind. A name may be bound in several ways, as in try and except."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, alias in self._imported(node):
                    aliases.setdefault(name, []).append(alias)

    def _imported(self, statement: ast.Import | ast.ImportFrom) -> list[tuple[str, Alias]]:
        if isinstance(statement, ast.Import):
            bound = [(each.asname or each.name.split(".")[0], each) for each in statement.names]
            return [(name, (each.name if each.asname else name, None)) for name, each in bound]
        base = statement.module or ""
        if statement.level:
            parts = self.name.split(".")
            parts = parts[: len(parts) - statement.level + self.is_package]
            base = ".".join([*parts, *([base] if base else [])])
        return [(each.asname or each.name, (base, each.name)) for each in statement.names]


@dataclass
class _References:
    """What a piece of code may use: definitions of the project as (module, name), and other names in full."""

    found: list[tuple[str, str]] = field(default_factory=list)
    external: set[str] = field(default_factory=set)


class _Sources:
    """The project's source files, parsed when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.module = functools.cache(self._module)

    def _module(self, name: str) -> _Module | None:
        if name.split(".")[0] not in PACKAGES:
            return None
        stem = self.root.joinpath(*name.split("."))
        for path, is_package in ((stem / "__init__.py", True), (stem.with_suffix(".py"), False)):
            if path.is_file():
                return _Module(name, is_package, ast.parse(path.read_bytes(), filename=str(path)))
        return None

    def packages_with_effects(self, module: str) -> list[tuple[str, str]]:
        """The packages around a module whose import does more than define names."""
        parts = module.split(".")
        packages = [self.module(".".join(parts[:depth])) for depth in range(1, len(parts))]
        return [(package.name, ON_IMPORT) for package in packages if package is not None and package.effects]

    def references(self, module: _Module, statements: list[ast.stmt]) -> _References:
        """What statements of a module may use."""
        references = _References()
        for statement in statements:
            aliases = {name: list(each) for name, each in module.aliases.items()}
            module.add_imports(statement, aliases)
            for head, *rest in _dotted_names(_without_annotations(statement)):
                if head in module.definitions:
                    references.found.append((module.name, head))
                for alias in aliases.get(head, ()):
                    self._resolve(_path(alias, rest), references)
                if head not in module.definitions and head not in aliases:
                    references.found += [(source, WHOLE_MODULE) for source, _ in aliases.get("*", ())]
        return references

    def aliased(self, module: _Module) -> _References:
        """What the names that a module imports stand for."""
        references = _References()
        for name, aliases in module.aliases.items():
            for source, original in aliases:
                if name == "*":
                    references.found.append((source, WHOLE_MODULE))
                else:
                    self._resolve(_path((source, original), []), references)
        return references

    def _resolve(self, path: list[str], into: _References, seen: frozenset[str] = frozenset()) -> None:
        """Follow ``a.b.c`` to the module it names and the definition in it, through re-exports."""
        dotted = ".".join(path)
        if path[0] not in PACKAGES:
            into.external.add(dotted)
            return
        if dotted in seen:  # such as an extension module, which has no source file
            return
        depth = len(path)
        while depth and self.module(".".join(path[:depth])) is None:
            depth -= 1
        module = self.module(".".join(path[:depth])) if depth else None
        if module is None:
            return
        if depth == len(path):  # the module is used as a value
            into.found.append((module.name, WHOLE_MODULE))
            return
        name = path[depth]
        if name in module.definitions:
            into.found.append((module.name, name))
        for alias in module.aliases.get(name, ()):
            self._resolve(_path(alias, path[depth + 1 :]), into, seen | {dotted})
        if name not in module.definitions and name not in module.aliases:
            into.found.append((module.name, WHOLE_MODULE))


def _path(alias: Alias, rest: list[str]) -> list[str]:
    source, name = alias
    return [*source.split("."), *([name] if name else []), *rest]


def _dotted_names(tree: ast.AST) -> list[list[str]]:
    """``a``, ``a.b.c`` and so on, as lists of names, longest first for each use."""
    found: list[list[str]] = []

    def visit(node: ast.AST) -> None:
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            found.append([inner.id, *parts])
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


class _Normaliser(ast.NodeTransformer):
    """Drops docstrings, also those of attributes, and the annotations that do not act."""

    def __init__(self) -> None:
        self.in_class_body = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        outer, self.in_class_body = self.in_class_body, True
        self.generic_visit(node)
        self.in_class_body = outer
        node.body = node.body or [ast.Pass()]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if self.in_class_body:
            return node
        if node.value is None:
            return None
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        outer, self.in_class_body = self.in_class_body, False
        node.returns = None
        for argument in (
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            node.args.vararg,
            node.args.kwarg,
        ):
            if argument is not None:
                argument.annotation = None
        self.generic_visit(node)
        self.in_class_body = outer
        node.body = node.body or [ast.Pass()]
        return node


def _without_annotations(statement: ast.stmt) -> ast.AST:
    copy = ast.parse(ast.unparse(statement))
    normalised: ast.AST = _Normaliser().visit(copy)
    return normalised


def _digest(statements: Iterable[ast.stmt], external: Iterable[str] = ()) -> str:
    text = "\n".join([*map(_normalised, statements), *sorted(external)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _normalised(statement: ast.stmt) -> str:
    """The statement's text in one formatting; ``ast.unparse`` varies less with Python than ``ast.dump``."""
    return ast.unparse(ast.fix_missing_locations(_without_annotations(statement)))
