"""What a platform cannot do is refused when the engine is configured, before anything is started.

Real on the platform that runs; for the others the same code is asked about devices that are made up.
"""

from __future__ import annotations

import pytest

from pytest_roll_vllm.contracts import contract
from roll_vllm import ConfigurationError, UnsupportedFeatureError, backends, create_async_llm, environment, versions
from roll_vllm.devices import Device

refusals = contract(
    "vd-platform-refusals",
    "What a platform or release cannot do is refused when the engine is configured, in words that say what to change.",
    references=("vllm-project/vllm#38550",),
    needs=("runtime",),
)

#: An engine that would get past its configuration ends here, and not in a start that takes half a minute.
NOWHERE = "/nowhere/model"


@refusals
async def test_sleep_mode_cannot_be_turned_off() -> None:
    with pytest.raises(ConfigurationError, match=r"enable_sleep_mode=False: .*leave it out"):
        await create_async_llm(model=NOWHERE, enable_sleep_mode=False)


@refusals
async def test_engine_that_this_platform_has_not_got(
    vllm_device: Device, vllm_version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    having = backends.of(vllm_device).engines(vllm_version)
    for engine in ("V0", "V1"):
        monkeypatch.setenv("VLLM_USE_V1", engine[1])
        message = "/nowhere/model" if engine in having else f"has no {engine} engine.*unset VLLM_USE_V1"
        with pytest.raises(ConfigurationError, match=message):
            await create_async_llm(model=NOWHERE)
    monkeypatch.setenv("VLLM_USE_V1", "yes")
    with pytest.raises(ConfigurationError, match="'yes' must be 0 or 1"):
        await create_async_llm(model=NOWHERE)


@refusals
async def test_placement_without_ray_is_explained(vllm_version: str) -> None:
    with pytest.raises((ConfigurationError, UnsupportedFeatureError), match="distributed_executor_backend is 'mp'"):
        await create_async_llm([{"placement_group": None}], model=NOWHERE, distributed_executor_backend="mp")


@refusals
@pytest.mark.parametrize("backend", sorted(backends.BACKENDS))
@pytest.mark.parametrize("release", [row.release for row in versions.TESTED])
def test_made_up_platforms(backend: str, release: str) -> None:
    """No device of these kinds is here, and none is asked for."""
    having = backends.get(backend).engines(release)
    assert having, f"vLLM {release} has no engine at all on {backend}"
    for engine in ("V0", "V1"):
        environ = {"VLLM_USE_V1": engine[1]}
        if engine in having:
            assert environment.engine_generation(release, backend, environ) == engine
            continue
        with pytest.raises(ConfigurationError, match=f"vLLM {release} has no {engine} engine.*unset VLLM_USE_V1"):
            environment.engine_generation(release, backend, environ)
    # Where vLLM's pool cannot give memory back, it is not asked to.
    without = backend.startswith("cpu") or (backend == "rocm" and not versions.at_least(release, "0.11.1"))
    assert not (without and backends.get(backend).enable_sleep_mode(release, having[-1]))
