"""The installed vLLM, and the patches that are for it."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

from roll_vllm import versions
from roll_vllm.patches.apply import selected
from roll_vllm.patches.patch import Patch
from roll_vllm.patches.registry import PATCHES

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # patch_orderings

INSTALLED = versions.installed()
assert INSTALLED is not None
VERSION = INSTALLED.version
SELECTED = selected(PATCHES, VERSION)


def stand_in_for_the_allocator() -> None:
    """0.8.4 imports its CUDA memory allocator at the top of the worker's module; it cannot be loaded without CUDA."""
    try:
        importlib.import_module("vllm.cumem_allocator")
    except ImportError:
        name = "vllm.cumem_allocator"
        module = types.ModuleType(name)
        for function in ("init_module", "python_create_and_map", "python_unmap_and_release"):
            setattr(module, function, None)
        sys.modules[name] = module


stand_in_for_the_allocator()


def owner_of(patch: Patch) -> tuple[Any, str]:
    *path, name = patch.qualname.split(".")
    owner: Any = importlib.import_module(patch.module)
    for part in path:
        owner = getattr(owner, part)
    return owner, name
