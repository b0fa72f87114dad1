"""What a stage's code is: the functions, classes and constants of this project that its function reaches.

Found by reading syntax trees, so nothing heavy is imported. Comments, docstrings, annotations and formatting
do not count, except annotations of class bodies, which decide what a dataclass or a decoder does. Where a
reference cannot be resolved to
one definition, the whole module counts: rather one run too many than a stale result.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("spctrl", "eval", "tasks", "pipelines")
WHOLE_MODULE = "*"


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
        if name == WHOLE_MODULE:
            reached[reference] = found.digest(list(found.tree.body))
            waiting += [(module, each) for each in found.definitions]
            continue
        definition = found.definitions[name]
        reached[reference] = found.digest([*found.effects, *definition])
        for statement in [*found.effects, *definition]:
            waiting += sources.references(found, statement)
    return dict(sorted(reached.items()))


@dataclass
class _Module:
    """One source file: what it defines, what it imports, and its statements that act on import."""

    name: str
    is_package: bool
    tree: ast.Module
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    aliases: dict[str, tuple[str, str | None]] = field(default_factory=dict)
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
                self.aliases |= self.imported(statement)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Expr(value=ast.Constant()):
                pass
            case _:
                self.effects.append(statement)

    def _sort_assignment(self, statement: ast.stmt) -> None:
        names = {
            n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        for name in names:
            self.definitions.setdefault(name, []).append(statement)
        if not names:  # such as TABLE["x"] = 1, which changes what another statement defined
            self.effects.append(statement)

    def imported(self, statement: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str | None]]:
        """``{local name: (module, name in it)}``; the name is None where the module itself is bound."""
        if isinstance(statement, ast.Import):
            return {
                alias.asname or alias.name.split(".")[0]: (
                    alias.name if alias.asname else alias.name.split(".")[0],
                    None,
                )
                for alias in statement.names
            }
        base = statement.module or ""
        if statement.level:
            parts = self.name.split(".")
            parts = parts[: len(parts) - statement.level + self.is_package]
            base = ".".join([*parts, *([base] if base else [])])
        return {alias.asname or alias.name: (base, alias.name) for alias in statement.names}

    def digest(self, statements: list[ast.stmt]) -> str:
        text = "\n".join(_normalised(statement) for statement in statements)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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

    def references(self, module: _Module, statement: ast.stmt) -> list[tuple[str, str]]:
        """Every definition of the project that a statement may use, as (module, name)."""
        aliases = dict(module.aliases)
        for node in ast.walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                aliases |= module.imported(node)
        found: list[tuple[str, str]] = []
        modules_as_values: list[str] = []
        for dotted in _dotted_names(_without_annotations(statement)):
            head, *rest = dotted
            if head in module.definitions:
                found.append((module.name, head))
            elif head in aliases:
                source, name = aliases[head]
                path = [*source.split("."), *([name] if name else []), *rest]
                found += self._resolve(path, modules_as_values)
            elif "*" in aliases:
                found.append((aliases["*"][0], WHOLE_MODULE))
        return found + [(name, WHOLE_MODULE) for name in modules_as_values]

    def _resolve(self, path: list[str], modules_as_values: list[str]) -> list[tuple[str, str]]:
        """Follow ``a.b.c`` to the module it names and the definition in it, through re-exports."""
        if path[0] not in PACKAGES:
            return []
        depth = len(path)
        while depth and self.module(".".join(path[:depth])) is None:
            depth -= 1
        module = self.module(".".join(path[:depth])) if depth else None
        if module is None:
            return []
        if depth == len(path):
            modules_as_values.append(module.name)
            return []
        name = path[depth]
        if name in module.definitions:
            return [(module.name, name)]
        if name in module.aliases:
            source, original = module.aliases[name]
            onward = [*source.split("."), *([original] if original else []), *path[depth + 1 :]]
            return self._resolve(onward, modules_as_values)
        return [(module.name, WHOLE_MODULE)]


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
    """Drops docstrings and the annotations that do not act."""

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
        _drop_docstring(node)
        return node

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
        _drop_docstring(node)
        return node


def _drop_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
    if ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:]
    node.body = node.body or [ast.Pass()]


def _without_annotations(statement: ast.stmt) -> ast.AST:
    copy = ast.parse(ast.unparse(statement))
    normalised: ast.AST = _Normaliser().visit(copy)
    return normalised


def _normalised(statement: ast.stmt) -> str:
    """The statement's text in one formatting; ``ast.unparse`` varies less with Python than ``ast.dump``."""
    return ast.unparse(ast.fix_missing_locations(_without_annotations(statement)))
