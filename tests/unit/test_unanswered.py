"""Calls that an engine has not answered when it dies, on an engine that is not vLLM's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from roll_vllm.engine import RolloutEngine
from roll_vllm.errors import EngineDiedError


def engine() -> Any:
    return SimpleNamespace(
        _death=None,
        _death_known=asyncio.Event(),
        _unanswered=set(),
        _gate=SimpleNamespace(fail=lambda error: None),
        _fail_requests=lambda error: None,
    )


def test_callers_learn_of_the_death() -> None:
    asyncio.run(callers_learn_of_the_death())


async def callers_learn_of_the_death() -> None:
    dying = engine()
    call = asyncio.ensure_future(RolloutEngine._or_death(dying, asyncio.Event().wait()))
    await asyncio.sleep(0)
    RolloutEngine._died(dying, EngineDiedError("rank 1 is gone"))
    with pytest.raises(EngineDiedError, match="rank 1 is gone"):
        await call
    await asyncio.sleep(0)
    assert not dying._unanswered


@pytest.mark.parametrize("walks_away", [True, False], ids=["cancelled", "timeout"])
def test_no_call_outlives_the_engine(walks_away: bool) -> None:
    """Whoever asked has gone, and the call goes on, since vLLM would give its answer to the next one."""
    asyncio.run(no_call_outlives_the_engine(walks_away))


async def no_call_outlives_the_engine(walks_away: bool) -> None:
    dying, begun = engine(), asyncio.all_tasks()
    if walks_away:
        caller = asyncio.ensure_future(RolloutEngine._or_death(dying, asyncio.Event().wait()))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
    else:
        assert not (await RolloutEngine._or_death(dying, asyncio.Event().wait(), 0.01)).done()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks() - begun) == 1
    RolloutEngine._died(dying, EngineDiedError("the engine was shut down"))
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == begun
