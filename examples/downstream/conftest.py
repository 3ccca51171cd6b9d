"""The one layer of fixtures that differs for us; the others follow from it.

Registered as a plugin, so that it holds for our own tests and for the suite, which lies outside of this directory.
"""

from __future__ import annotations

from typing import Any

import pytest


class OurFixtures:
    @pytest.fixture
    def vllm_engine_args(self, vllm_engine_args: dict[str, Any]) -> dict[str, Any]:
        """The plugin's arguments, with our scheduling."""
        return {**vllm_engine_args, "max_num_batched_tokens": 1024}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(OurFixtures(), "tiny-rollout-fixtures")
