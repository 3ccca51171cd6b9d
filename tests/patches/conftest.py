"""The patches on a real vLLM, without an engine and without a GPU: run with each tested release."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

#: Without a vLLM there is nothing to run here; tests/unit needs none.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("vllm") is None else []


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Set one patch by its name, for this test; returns the class. Skips where the release does not need it."""

    from on_vllm import SELECTED, VERSION, owner_of

    def set_patch(name: str) -> Any:
        patch = next((patch for patch in SELECTED if patch.name == name), None)
        if patch is None:
            pytest.skip(f"{name} is not for vLLM {VERSION}")
        owner, attribute = owner_of(patch)
        monkeypatch.setattr(owner, attribute, patch.replacement(vars(owner)[attribute]))
        return owner

    return set_patch


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
