"""Imports point one way, and versions are compared in one module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "roll_vllm": {"pytest", "_pytest", "pytest_roll_vllm", "conformance"},
    "pytest_roll_vllm": {"conformance"},
}
PACKAGES = ("roll_vllm", "pytest_roll_vllm", "conformance")
LIGHT = ("roll_vllm", "roll_vllm.errors", "roll_vllm.versions", "roll_vllm.devices", "roll_vllm.environment")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and module of everything imported by name, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "importorskip"):
                yield node.lineno, str(node.args[0].value)


def wrong_imports(tree: ast.AST, forbidden: set[str]) -> list[str]:
    return [f"line {line}: imports {name}" for line, name in imports(tree) if name.split(".")[0] in forbidden]


def texts(node: ast.AST) -> list[str]:
    """Return the strings a comparison has on one side: itself, or the elements of a tuple, list or set."""
    nodes = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return [part.value for part in nodes if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def names_version(node: ast.AST) -> bool:
    return any(
        (isinstance(part, ast.Attribute) and part.attr == "__version__")
        or (isinstance(part, ast.Name) and part.id == "__version__")
        for part in ast.walk(node)
    )


def version_comparisons(tree: ast.AST) -> list[str]:
    """Find uses of ``packaging``, and comparisons of a version with text."""
    found = [f"line {line}: imports {name}" for line, name in imports(tree) if name.split(".")[0] == "packaging"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            compared = [text for side in sides for text in texts(side)]
            if any(re.match(r"v?\d+\.\d", text) for text in compared) or (
                compared and any(names_version(side) for side in sides)
            ):
                found.append(f"line {node.lineno}: compares {ast.unparse(node)}")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith", "split")
            and names_version(node.func.value)
        ):
            found.append(f"line {node.lineno}: takes apart {ast.unparse(node)}")
    return found


def modules(*packages: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for name in packages for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("module", modules(*FORBIDDEN))
def test_imports_point_one_way(module: str) -> None:
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    assert wrong_imports(tree, FORBIDDEN[Path(module).parts[0]]) == []


@pytest.mark.parametrize("module", [name for name in modules(*PACKAGES) if name != "roll_vllm/versions.py"])
def test_versions_are_compared_in_one_module(module: str) -> None:
    assert version_comparisons(ast.parse((ROOT / module).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pytest",
        "def f():\n    from pytest_roll_vllm.engines import pool",
        "import conformance.test_sleep as s",
        "importlib.import_module('pytest')",
    ],
)
def test_the_import_check_finds(source: str) -> None:
    assert wrong_imports(ast.parse(source), FORBIDDEN["roll_vllm"])


@pytest.mark.parametrize(
    "source",
    [
        "import packaging.version",
        "def f():\n    from packaging.version import Version",
        "vllm.__version__ == 'dev'",
        "vllm.__version__ < '0.8.5'",
        "'0.8.4' == version",
        "version in ('0.8.4', '0.10.2')",
        "Version(__version__) >= '0.11'",
        "vllm.__version__.startswith('0.11')",
        "tuple(vllm.__version__.split('.'))",
    ],
)
def test_the_version_check_finds(source: str) -> None:
    assert version_comparisons(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "satisfies(version, '>=0.11')",
        "at_least(vllm.__version__, '0.10.2')",
        "ratio > 0.25",
        "name == 'vllm'",
    ],
)
def test_the_version_check_lets_pass(source: str) -> None:
    assert version_comparisons(ast.parse(source)) == []


def test_light_modules_import_neither_torch_nor_vllm() -> None:
    program = (
        f"import sys; before = set(sys.modules); import {', '.join(LIGHT)}; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}"
        " & {'torch', 'vllm', 'ray', 'numpy', 'transformers', 'pytest'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
