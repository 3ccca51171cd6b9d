"""Runs ``async def`` tests of ours where no other plugin does.

pytest-asyncio and anyio come first for tests that they claim, by a mark or by their automatic mode: the one
has then replaced the coroutine function, the other answers the same hook earlier.
"""

from __future__ import annotations

import inspect

import pytest

from pytest_roll_vllm.markers import uses_plugin


def run(function: pytest.Function) -> bool | None:
    """Run a test if it is a coroutine function of ours, each in an event loop of its own.

    Returns:
        ``True`` if the test was run, ``None`` if it is left to others.
    """
    if not inspect.iscoroutinefunction(function.obj) or not uses_plugin(function):
        return None
    import asyncio  # takes 20 ms, which other projects need not pay

    arguments = {name: function.funcargs[name] for name in function._fixtureinfo.argnames}
    asyncio.run(function.obj(**arguments))
    return True
