"""Finding a target in Python sources, without importing them."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from roll_vllm.patches.fingerprint import Function, fingerprint, parameters

_parsing = threading.Lock()
_PAUSES_S = (0.0, 0.01, 0.1, 0.5)


@dataclass(frozen=True)
class Found:
    """A function in a source file.

    Attributes:
        path: The file.
        line: Its first line, decorators included, as in its code object.
        parameters: The names of its parameters.
        fingerprint: The digest of its code.
        decorated: Whether it has decorators, so that the live attribute may be a wrapper.
    """

    path: Path
    line: int
    parameters: tuple[str, ...]
    fingerprint: str
    decorated: bool


class NotFound(LookupError):
    """A target is not in the sources; the message says which part of it is missing."""


class SourceTree:
    """The sources of a package, as a directory that holds the package's.

    Only what stands at the top level of a module or class is seen: what is defined under an ``if``, or by
    assignment, is not found.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, tuple[Path, ast.Module]] = {}

    def find(self, target: str) -> Found:
        """Find a target, in a base class if the class itself does not define it.

        Raises:
            NotFound: It is not there.
        """
        module, _, qualname = target.partition(":")
        *classes, name = qualname.split(".")
        path, scope = self._module(module)
        body: list[ast.stmt] = scope.body
        found: tuple[Path, Function] | None = None
        if classes:
            for part in classes[:-1]:
                body = self._named(body, part, module).body
            found = self._method(module, self._named(body, classes[-1], module), name)
        else:
            found = next(((path, node) for node in _functions(body, name)), None)
        if found is None:
            raise NotFound(f"no function {qualname} in {module}")
        path, function = found
        first = min([function.lineno, *(node.lineno for node in function.decorator_list)])
        return Found(path, first, tuple(parameters(function)), fingerprint(function), bool(function.decorator_list))

    def _module(self, name: str) -> tuple[Path, ast.Module]:
        if name not in self._modules:
            base = self.root.joinpath(*name.split("."))
            path = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
            if path is None:
                raise NotFound(f"no module {name}")
            self._modules[name] = path, _parsed(path)
        return self._modules[name]

    @staticmethod
    def _named(body: list[ast.stmt], name: str, module: str) -> ast.ClassDef:
        for node in reversed(body):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
        raise NotFound(f"no class {name} in {module}")

    def _method(self, module: str, owner: ast.ClassDef, name: str) -> tuple[Path, Function] | None:
        path, scope = self._module(module)
        for function in _functions(owner.body, name):
            return path, function
        for base in owner.bases:
            if isinstance(base, ast.Name) and (place := self._origin(module, scope, base.id)) is not None:
                found = self._method(place[0], place[1], name)
                if found is not None:
                    return found
        return None

    def _origin(self, module: str, scope: ast.Module, name: str) -> tuple[str, ast.ClassDef] | None:
        """Where a class comes from: this module, or another one of the tree."""
        for node in reversed(scope.body):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        parent = ".".join(module.split(".")[: -node.level]) + "." if node.level else ""
                        try:
                            return self._origin(other := parent + node.module, self._module(other)[1], alias.name)
                        except NotFound:
                            return None
        return None


def _parsed(path: Path) -> ast.Module:
    # Before Python 3.11.8, two threads that parse at the same time disturb each other; engines may start in several.
    text = path.read_bytes()
    for pause in _PAUSES_S:
        with _parsing, contextlib.suppress(SystemError):
            return ast.parse(text, str(path))
        time.sleep(pause)  # the other one is not ours
    return ast.parse(text, str(path))


def _functions(body: list[ast.stmt], name: str) -> Iterator[Function]:
    # The last one counts, as when the module runs: the others are overloads.
    for node in reversed(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            yield node


def installed(package: str) -> SourceTree:
    """The tree of an installed top-level package, which is not imported.

    Raises:
        NotFound: There is none.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(f"no package {package}")
    return SourceTree(Path(next(iter(spec.submodule_search_locations))).parent)
