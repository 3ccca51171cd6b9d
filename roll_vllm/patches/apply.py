"""Setting patches in this process, all or none of them, and taking them back."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from roll_vllm import versions
from roll_vllm.patches import drift, sources
from roll_vllm.patches.hook import ImportHook
from roll_vllm.patches.patch import ForeignChangeError, MissingTargetError, OverlapError, Patch, PatchError
from roll_vllm.patches.sources import Found, SourceTree

_ABSENT = object()

#: What can become of a patch in a process. "deferred": its module has not been imported yet; set when it is.
OUTCOMES = ("applied", "deferred", "not applicable", "failed")


@dataclass(frozen=True)
class Outcome:
    """What became of a patch: one of :data:`OUTCOMES`, and why if it was not applied."""

    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class _Set:
    patch: Patch
    owner: type
    name: str
    before: Any  # the class's own attribute; _ABSENT if it was inherited
    after: Any


def selected(patches: Sequence[Patch], version: str) -> list[Patch]:
    """The patches whose ranges cover a version.

    Raises:
        OverlapError: Two of them have the same target or the same name.
    """
    chosen = [patch for patch in patches if versions.satisfies(version, patch.versions)]
    seen: dict[str, Patch] = {}
    for patch in chosen:
        for key in (patch.target, patch.name):
            other = seen.setdefault(key, patch)
            if other is not patch:
                raise OverlapError(
                    patch.name,
                    patch.target,
                    f"one patch of {key} on {version}",
                    f"{other.name!r} for {other.versions} and {patch.name!r} for {patch.versions}",
                )
    return chosen


class Application:
    """A set of patches on one version, in this process.

    Args:
        patches: The registry, whole.
        version: The version of vLLM that is installed.
        tree: Its sources.
        fingerprints: What the replacements were written against.
        changed: Called when a deferred patch was set, or failed.
    """

    def __init__(
        self,
        patches: Sequence[Patch],
        version: str,
        tree: SourceTree | None = None,
        fingerprints: drift.Fingerprints | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._patches, self._version, self._changed = patches, version, changed
        self._tree = tree
        self._fingerprints = drift.recorded() if fingerprints is None else fingerprints
        self._lock = threading.RLock()
        self._hook = ImportHook()
        self._done: list[_Set] = []
        self.outcomes: dict[str, Outcome] = {}
        self.error: PatchError | None = None

    def apply(self) -> None:
        """Check every target, then set all of them; on any error set none. Once: a second call changes nothing.

        Targets in modules that have not been imported are set as soon as they are: importing them here could
        be slow, or impossible in this process.

        Raises:
            PatchError: Nothing was changed; :attr:`outcomes` says which patch failed and why.
        """
        with self._lock:
            if self.error is not None:
                raise self.error
            if self.outcomes:
                return
            self.outcomes = {
                patch.name: Outcome("not applicable", f"for vLLM {patch.versions}") for patch in self._patches
            }
            places = self._checked(selected(self._patches, self._version))
            actions = {}
            for module in dict.fromkeys(patch.module for patch, _ in places):
                actions[module] = self._setter(places, module)
                self._hook.after(module, actions[module])
            # After the hook is in place, so that no import can slip through between the two.
            for module, action in actions.items():
                if module in sys.modules:
                    action(importlib.import_module(module))  # waits for another thread that is just importing it

    def _setter(self, places: list[tuple[Patch, Found]], name: str) -> Callable[[ModuleType], None]:
        here = [(patch, found) for patch, found in places if patch.module == name]
        for patch, _ in here:
            self.outcomes[patch.name] = Outcome("deferred", f"{name} is not imported in this process")

        def set_all(module: ModuleType) -> None:
            try:
                with self._lock:
                    for patch, found in here:
                        if self.outcomes[patch.name].outcome == "deferred":
                            self._set(patch, found, module, places)
            finally:
                self._changed()

        return set_all

    def undo(self) -> None:
        """Take everything back, last first. What somebody else has changed meanwhile is left to them.

        Raises:
            ForeignChangeError: That happened; everything else is undone.
        """
        with self._lock:
            self._hook.clear()
            foreign: list[PatchError] = []
            while self._done:
                done = self._done.pop()
                now = done.owner.__dict__.get(done.name, _ABSENT)
                if now is not done.after:
                    wanted, found = _described(done.after), _described(now)
                    foreign.append(ForeignChangeError(done.patch.name, done.patch.target, wanted, found))
                elif done.before is _ABSENT:
                    delattr(done.owner, done.name)
                else:
                    setattr(done.owner, done.name, done.before)
            self.outcomes, self.error = {}, None
            if foreign:
                raise foreign[0]

    def _checked(self, chosen: list[Patch]) -> list[tuple[Patch, Found]]:
        places: list[tuple[Patch, Found]] = []
        errors: list[PatchError] = []
        trees: dict[str, SourceTree] = {}
        row = versions.resolve(self._version)
        release = row.release if row else str(versions.base(self._version))
        for patch in chosen:
            if not drift.known(patch, release, self._fingerprints):
                reason = f"no fingerprint for vLLM {release}: this code was not reviewed"
                self.outcomes[patch.name] = Outcome("not applicable", reason)
                continue
            package = patch.module.partition(".")[0]
            try:
                tree = self._tree or trees.setdefault(package, sources.installed(package))
                places.append((patch, drift.check(patch, release, tree, self._fingerprints)))
            except sources.NotFound as error:
                errors.append(MissingTargetError(patch.name, patch.target, "an installed package", str(error)))
            except PatchError as error:
                errors.append(error)
        if errors:
            self._refuse(places, errors)
        return places

    def _refuse(self, places: list[tuple[Patch, Found]], errors: list[PatchError]) -> None:
        """Record the failures, and that the others are out for their sake."""
        for patch, _ in places:
            self.outcomes[patch.name] = Outcome("failed", f"left out, because {errors[0].patch!r} failed")
        for error in errors:
            self.outcomes[error.patch] = Outcome("failed", str(error))
        self.error = errors[0]
        raise self.error

    def _set(self, patch: Patch, found: Found, module: ModuleType, places: list[tuple[Patch, Found]]) -> None:
        try:
            owner, name = _owner(patch, module)
            original = inspect.getattr_static(owner, name, _ABSENT)
            if not _is_code_at(original, found):
                raise ForeignChangeError(
                    patch.name, patch.target, f"the function at {found.path}:{found.line}", _described(original)
                )
            before = owner.__dict__.get(name, _ABSENT)
            after = patch.replacement(original)
            setattr(owner, name, after)
        except Exception as error:
            outcomes = self.outcomes
            with contextlib.suppress(ForeignChangeError):
                self.undo()
            self.outcomes = outcomes
            if not isinstance(error, PatchError):
                error = PatchError(patch.name, patch.target, "a replacement", f"{type(error).__name__}: {error}")
            self._refuse(places, [error])
        self._done.append(_Set(patch, owner, name, before, after))
        self.outcomes[patch.name] = Outcome("applied")


def _owner(patch: Patch, module: ModuleType) -> tuple[type, str]:
    """The class that is to be changed, and the attribute's name."""
    *path, name = patch.qualname.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part, None)
    wanted = f"{patch.module}:{'.'.join(path)}"
    if not isinstance(owner, type) or f"{owner.__module__}:{owner.__qualname__}" != wanted:
        raise ForeignChangeError(patch.name, patch.target, f"the class {wanted}", _described(owner))
    return owner, name


def _is_code_at(attribute: Any, found: Found) -> bool:
    function = getattr(attribute, "__func__", attribute)
    if found.decorated:
        function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    return (
        code is not None
        and code.co_firstlineno == found.line
        and os.path.realpath(code.co_filename) == os.path.realpath(found.path)
    )


def _described(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    function = getattr(value, "__func__", value)
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(value))}"
    code = getattr(function, "__code__", None)
    return f"{name} at {code.co_filename}:{code.co_firstlineno}" if code else name
