"""A small package to patch, standing in for vLLM: the real one cannot be had where the unit tests run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from roll_vllm.patches.apply import Application
from roll_vllm.patches.command import fingerprints
from roll_vllm.patches.patch import Patch
from roll_vllm.patches.sources import SourceTree

RELEASE = "0.12.0"

FILES = {
    "faked/__init__.py": "",
    "faked/base.py": '''
class Base:
    def inherited(self, value):
        """From the base."""
        return ["base", value]
''',
    "faked/engine.py": """
from functools import wraps

from faked.base import Base as Parent


def loud(function):
    @wraps(function)
    def wrapper(*args):
        return ["loud", *function(*args)]
    return wrapper


class Engine(Parent):
    def run(self, value):
        # A comment.
        return ["run", value]

    def stop(self, value, *rest, now=False, **more):
        return ["stop", value]

    @staticmethod
    def static(value):
        return ["static", value]

    @classmethod
    def of(cls, value):
        return [cls.__name__, value]

    @loud
    def decorated(self, value):
        return ["decorated", value]

    class Inner:
        def run(self, value):
            return ["inner", value]


def function(value):
    return value
""",
    "faked/worker.py": """
class Worker:
    def load(self, value):
        return ["load", value]
""",
}


class Faked:
    """The package in a directory, patches of it, and what was recorded of its sources."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in FILES.items():
            path = root / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")

    @property
    def tree(self) -> SourceTree:
        return SourceTree(self.root)

    def edit(self, module: str, old: str, new: str) -> None:
        """Change the sources, as a new release would."""
        path = self.root / "faked" / f"{module}.py"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"faked.{name}")

    def imported(self, name: str) -> bool:
        return f"faked.{name}" in sys.modules

    def application(
        self, *patches: Patch, version: str = RELEASE, recorded: Any = None, changed: Callable[[], None] = lambda: None
    ) -> Application:
        known = fingerprints(patches, {RELEASE: self.tree}) if recorded is None else recorded
        return Application(patches, version, self.tree, known, changed)


def prefixed(original: Any) -> Any:
    """A replacement that puts "patched" in front of what the original returns."""
    function = getattr(original, "__func__", original)

    @wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return ["patched", *function(*args, **kwargs)]

    return type(original)(patched) if isinstance(original, (staticmethod, classmethod)) else patched


def patch(target: str, name: str = "", **fields: Any) -> Patch:
    """A patch of the package."""
    given = {
        "versions": ">=0.8,<0.13",
        "replacement": prefixed,
        "why": "w",
        "upstream": "u",
        "remove_when": "r",
        **fields,
    }
    return Patch(name or target.rpartition(".")[2], f"faked.{target}", **given)


@contextmanager
def clean_imports() -> Iterator[None]:
    """Whatever is imported of the package is forgotten, and the import system is as before."""
    finders = list(sys.meta_path)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "faked"]:
            del sys.modules[name]
        assert sys.meta_path == finders, "an import hook was left behind"
