"""Acting on a module right after it has been imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


class ImportHook(MetaPathFinder):
    """Lets the other finders find a module, and runs an action once its code has run.

    What the action raises, the import raises.
    """

    def __init__(self) -> None:
        self._actions: dict[str, Action] = {}

    def after(self, module: str, action: Action) -> None:
        """Run ``action`` when ``module`` is imported, which must not have happened yet."""
        self._actions[module] = action
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def clear(self) -> None:
        """Forget all actions."""
        self._actions.clear()
        if self in (sys.meta_path or ()):  # None while Python shuts down
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Part of the import system."""
        if fullname not in self._actions:
            return None
        # Only those behind: one in front may be asking everybody else, as we do.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ActingLoader(spec.loader, self._act)
                return spec
        return None

    def _act(self, module: ModuleType) -> None:
        action = self._actions.pop(module.__name__, None)
        if not self._actions:
            self.clear()
        if action is not None:
            action(module)


class _ActingLoader(Loader):
    def __init__(self, loader: Loader, action: Action) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Nobody who looks at the module shall see us.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._action(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
