"""What a function's source comes down to when everything without effect is left out."""

from __future__ import annotations

import ast
import hashlib
import json
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef

#: Differ between Python versions, or say nothing that the rest does not.
_IGNORED = {"ctx", "kind", "type_comment"}


def parameters(function: Function) -> list[str]:
    """The names of a function's parameters in order, with ``*`` and ``**`` where they belong."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    if given.vararg or given.kwonlyargs:
        names.append("*" + (given.vararg.arg if given.vararg else ""))
    names += [argument.arg for argument in given.kwonlyargs]
    if given.kwarg:
        names.append("**" + given.kwarg.arg)
    return names


def fingerprint(function: Function) -> str:
    """A digest of a function's code, the same for every Python from 3.10 on.

    Comments, docstrings, blank space and line breaks do not count; decorators, defaults and annotations do.
    """
    text = json.dumps(_normal(function), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _normal(node: Any) -> Any:
    if isinstance(node, list):
        return [_normal(item) for item in node]
    if not isinstance(node, ast.AST):
        return [type(node).__name__, repr(node)]
    if isinstance(node, ast.JoinedStr):
        return ["JoinedStr", _joined(node.values)]
    fields = {
        name: _normal(_without_docstring(node, value) if name == "body" else value)
        for name, value in ast.iter_fields(node)
        if name not in _IGNORED and value is not None and value != []
    }
    return [type(node).__name__, fields]


def _joined(values: list[ast.expr]) -> list[Any]:
    """The parts of an f-string. Python 3.12 cuts the text between two expressions into several pieces."""
    parts: list[Any] = []
    for value in values:
        text = value.value if isinstance(value, ast.Constant) else None
        if not isinstance(text, str):
            parts.append(_normal(value))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += text
        elif text:
            parts.append(text)
    return parts


def _without_docstring(node: ast.AST, body: Any) -> Any:
    documented = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    return body[1:] if documented and ast.get_docstring(node, clean=False) is not None else body  # type: ignore[arg-type]
