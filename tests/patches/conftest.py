"""The patches on a real vLLM, without an engine and without a GPU: run with each tested release."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="tests/patches needs a vLLM; tests/unit does not")

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # patch_orderings

from roll_vllm import versions
from roll_vllm.patches.apply import selected
from roll_vllm.patches.patch import Patch
from roll_vllm.patches.registry import PATCHES

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


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Set one patch by its name, for this test; returns the class. Skips where the release does not need it."""

    def set_patch(name: str) -> Any:
        patch = next((patch for patch in SELECTED if patch.name == name), None)
        if patch is None:
            pytest.skip(f"{name} is not for vLLM {VERSION}")
        owner, attribute = owner_of(patch)
        monkeypatch.setattr(owner, attribute, patch.replacement(vars(owner)[attribute]))
        return owner

    return set_patch


def owner_of(patch: Patch) -> tuple[Any, str]:
    *path, name = patch.qualname.split(".")
    owner: Any = importlib.import_module(patch.module)
    for part in path:
        owner = getattr(owner, part)
    return owner, name


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups, for this process alone."""
    from vllm.distributed import parallel_state

    rendezvous = tmp_path_factory.mktemp("group") / "file"
    parallel_state.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
    parallel_state.initialize_model_parallel(1, 1, backend="gloo")
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
