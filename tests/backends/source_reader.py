"""Reading the sources of a release, and running parts of them that need no device."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any


class Source:
    """The Python files of one release of a package, read and not imported."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, module: str) -> bool:
        return self._path(module).is_file()

    def tree(self, module: str) -> ast.Module:
        return ast.parse(self._path(module).read_text(encoding="utf-8"))

    def text(self, module: str) -> str:
        return self._path(module).read_text(encoding="utf-8")

    def _path(self, module: str) -> Path:
        path = self.root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def find_class(self, qualname: str) -> ast.ClassDef:
        """The class of a module at top level."""
        module, _, name = qualname.rpartition(".")
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
        raise LookupError(f"{module} has no class {name}")

    def function(self, module: str, name: str) -> ast.FunctionDef:
        """A function of a module at top level."""
        return _named(self.tree(module), name)

    def method(self, qualname: str, name: str) -> ast.FunctionDef:
        """A method that the class itself defines."""
        return _named(self.find_class(qualname), name)

    def attribute(self, qualname: str, name: str) -> Any:
        """A constant that is assigned in the class's body; None if there is none of that name."""
        for node in self.find_class(qualname).body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return ast.literal_eval(node.value)  # type: ignore[attr-defined]
        return None


def _named(scope: ast.Module | ast.ClassDef, name: str) -> ast.FunctionDef:
    for node in scope.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"no function {name}")


def run(nodes: list[ast.stmt], **names: Any) -> dict[str, Any]:
    """Run statements of a release with these names, and return all names afterwards."""
    exec(compile(ast.Module(nodes, []), "<released>", "exec"), names)
    return names


def call(function: ast.FunctionDef, *arguments: Any, **names: Any) -> Any:
    """Call a function of a release that uses no names but these."""
    bare = ast.FunctionDef(**{**vars(function), "decorator_list": []})
    return run([bare], **names)[function.name](*arguments)


def constants(node: ast.AST) -> set[Any]:
    """All constants below a node."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}


def pip(*arguments: str) -> str:
    """Run pip, and return what it prints."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"pip {arguments[0]} failed; `tox run -e backends` has all it needs: {done.stderr}"
    return done.stdout


def download_ascend(version: str, cache: Path) -> Path:
    """Return the directory of a release of vllm-ascend, downloaded by pip if the cache does not have it."""
    final = cache / f"vllm_ascend-{version}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        command = ["download", "--no-deps", "--dest", scratch, f"vllm-ascend=={version}"]
        try:
            wheel = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_24_x86_64")
            pip(*command, *wheel)
        except AssertionError:
            # The first releases have no wheels. pip runs a source distribution's setup.py, which here gets by
            # without torch.
            pip(*command, "--no-binary=:all:", "--no-build-isolation")
        (archive,) = Path(scratch).iterdir()
        unpacked = Path(scratch) / "tree"
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                file.extractall(unpacked)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
            (unpacked,) = unpacked.iterdir()
        try:
            os.rename(unpacked, final)
        except OSError:
            assert final.is_dir()  # somebody else was faster
    return final
