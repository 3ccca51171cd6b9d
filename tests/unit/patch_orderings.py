"""Every order in which a module can be imported and patches applied and undone, run in a process of its own.

``I`` imports the modules, ``A`` applies, ``U`` undoes. After each step every target is what the order says.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterable
from itertools import permutations
from types import FunctionType
from typing import Any

from roll_vllm.patches.apply import Application
from roll_vllm.patches.patch import Patch

#: What an order is made of: once each, and with applying or undoing repeated.
STEPS = ("IA", "IU", "IAU", "IAA", "IAAU", "IAUU")

ORDERINGS = (
    *("IA", "AI"),
    *("IU", "UI"),
    *("IAU", "IUA", "AIU", "AUI", "UIA", "UAI"),
    *("IAA", "AIA", "AAI"),
    *("IAAU", "IAUA", "IUAA", "AIAU", "AIUA", "AAIU", "AAUI", "AUIA", "AUAI", "UIAA", "UAIA", "UAAI"),
    *("IAUU", "IUAU", "IUUA", "AIUU", "AUIU", "AUUI", "UIAU", "UIUA", "UAIU", "UAUI", "UUIA", "UUAI"),
)


def missing(orderings: Iterable[str]) -> set[str]:
    """The orders that a list lacks, and those that it has in excess."""
    wanted = {"".join(order) for steps in STEPS for order in permutations(steps)}
    return wanted.symmetric_difference(orderings)


def run(order: str, application: Application, patches: Iterable[Patch]) -> None:
    """Run one order, and compare after each step."""
    patches = list(patches)
    imported = applied = False
    originals: dict[str, Any] = {}
    for step in order:
        if step == "I":
            for patch in patches:
                importlib.import_module(patch.module)
            imported = True
        elif step == "A":
            application.apply()
            applied = True
        else:
            application.undo()
            applied = False
        if imported:
            for patch in patches:
                owner, name = _owner(patch)
                now = inspect.getattr_static(owner, name)
                is_original = _is_from(now, patch.module)
                assert is_original is not applied, f"{order}: after {step}, {patch.target} is {now}"
                if is_original:
                    assert originals.setdefault(patch.target, now) is now, f"{order}: {patch.target} is another one"
            expected = "applied" if applied else None
            outcomes = {
                application.outcomes[p.name].outcome if p.name in application.outcomes else None for p in patches
            }
            assert outcomes == {expected}, f"{order}: after {step}, outcomes are {outcomes}"


def _owner(patch: Patch) -> tuple[Any, str]:
    *path, name = patch.qualname.split(".")
    owner: Any = importlib.import_module(patch.module)
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def _is_from(attribute: Any, module: str) -> bool:
    function = getattr(attribute, "__func__", attribute)
    assert isinstance(function, FunctionType)
    source = importlib.import_module(module).__file__
    assert source is not None
    return os.path.realpath(function.__code__.co_filename) == os.path.realpath(source)
