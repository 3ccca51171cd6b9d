"""What a target says that it can do is so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from pytest_roll_vllm.contracts import contract
from pytest_roll_vllm.engines import EngineHandle
from pytest_roll_vllm.options import Settings
from pytest_roll_vllm.trainer import Trainer
from roll_vllm import RollVllmError
from roll_vllm.errors import UnsupportedFeatureError

Call = Callable[[EngineHandle, Trainer], Awaitable[object]]


async def _lora(engine: EngineHandle, trainer: Trainer) -> None:
    # An engine without adapters may refuse one, which is not to say that there are none.
    await engine.target.add_lora({}, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]})


async def _sleep(engine: EngineHandle, trainer: Trainer) -> None:
    await engine.target.sleep(1)


async def _sleep_level_2(engine: EngineHandle, trainer: Trainer) -> None:
    await engine.target.sleep(2)


async def _tags(engine: EngineHandle, trainer: Trainer) -> None:
    await engine.target.wake_up(["weights"])


async def _update(engine: EngineHandle, trainer: Trainer) -> None:
    await trainer.push(engine, trainer.reference_version)


async def _collective(engine: EngineHandle, trainer: Trainer) -> None:
    await trainer.push(engine, trainer.reference_version, transport="collective")


#: How to ask for each; what has no call of its own is left to the contracts that need it.
ASK: dict[str, Call] = {
    "abort": lambda engine, _: engine.target.abort(["nobody"]),
    "cache.reset": lambda engine, _: engine.target.reset_prefix_cache(),
    "checksum": lambda engine, _: engine.target.checksums(),
    "lora": _lora,
    "pause": lambda engine, _: engine.target.pause_generation("wait"),
    "pause.keep": lambda engine, _: engine.target.pause_generation("keep"),
    "sleep": _sleep,
    "sleep.level2": _sleep_level_2,
    "sleep.tags": _tags,
    "state": lambda engine, _: engine.target.state(),
    "update": _update,
    "update.collective": _collective,
}


@contract(
    "vd-capabilities-declared",
    "What a target declares that it does not have is refused by one error that says so; whatever else it is asked for, "
    "it does not say that it cannot do such a thing.",
    references=("vllm-project/vllm#22197", "vllm-project/vllm#28037"),
)
@pytest.mark.parametrize("capability", ASK)
async def test_declared_is_so(
    vllm_engine: EngineHandle, vllm_trainer: Trainer, vllm_settings: Settings, capability: str
) -> None:
    async def ask() -> None:
        # Each on the engine's own loop, where a target's methods belong.
        if capability.startswith("update"):
            await ASK[capability](vllm_engine, vllm_trainer)
        else:
            await vllm_engine._call(ASK[capability], vllm_engine, vllm_trainer)  # type: ignore[arg-type]

    missing = vllm_settings.missing(capability)
    if missing:
        with pytest.raises(UnsupportedFeatureError) as caught:
            await ask()
        assert capability.rpartition(".")[2] in str(caught.value), f"it does not say of what: {caught.value}"
        return
    try:
        await ask()
    except UnsupportedFeatureError as error:
        pytest.fail(f"{capability} is declared, and refused: {error}")
    except RollVllmError:
        pass  # it was asked for nothing sensible
