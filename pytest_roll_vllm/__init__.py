"""The pytest plugin: options, markers, fixtures and reports for testing vLLM as a rollout engine."""

from __future__ import annotations

DISTRIBUTION = "pytest-roll-vllm"


def __getattr__(name: str) -> str:
    # On demand, because reading metadata takes milliseconds that no other project's run should pay.
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version(DISTRIBUTION)
        except metadata.PackageNotFoundError:
            return "unknown (not installed)"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
