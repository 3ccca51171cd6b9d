"""The target ``vllm``: vLLM as it is, used the way its own examples for RL use it. Nothing of roll_vllm is in it.

It shows what the runtime adds on each version; what is expected to fail on it is in ``expectations/vllm.toml``.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_roll_vllm.targets import FULL, Capability, Support, Target

if TYPE_CHECKING:
    import torch

_ACCELERATORS = ("cuda", "rocm", "npu")
_NO_SLEEP = "vLLM sleeps on accelerators only"


class PlainVllm(Target):
    """``AsyncLLM``, or ``AsyncLLMEngine`` for V0, with a worker extension that loads weights and takes checksums."""

    name = "vllm"
    capabilities: ClassVar[Mapping[str, Capability]] = {
        "abort": Capability(
            Support.VERSIONED, "0.8.4 leaves an aborted caller without a final output", versions=">=0.10"
        ),
        "abort.partial": Capability(
            Support.VERSIONED, "0.8.4 leaves an aborted caller without a final output", versions=">=0.10"
        ),
        "cache.reset": Capability(
            Support.VERSIONED, "before 0.12.0 nothing says whether the cache is empty", versions=">=0.12"
        ),
        "checksum": FULL,
        "lora": Capability(Support.UNSUPPORTED, "vLLM takes adapters from directories only"),
        "pause": Capability(Support.VERSIONED, "there is no pause before 0.12.0", versions=">=0.12"),
        "pause.keep": Capability(Support.UNSUPPORTED, "requests can be aborted or waited for, not frozen"),
        "runtime": Capability(Support.UNSUPPORTED, "it is plain vLLM"),
        "sleep": Capability(Support.VERSIONED, _NO_SLEEP, backends=_ACCELERATORS),
        "sleep.level2": Capability(Support.VERSIONED, _NO_SLEEP, backends=_ACCELERATORS),
        "sleep.tags": Capability(Support.VERSIONED, _NO_SLEEP, backends=_ACCELERATORS),
        "state": Capability(Support.UNSUPPORTED, "vLLM does not know whether its weights are one complete set"),
        "update": FULL,
        "update.collective": Capability(Support.NOT_IMPLEMENTED, "the target sends weights by files in shared memory"),
        "update.checked": Capability(Support.UNSUPPORTED, "load_weights() takes what it gets, complete or not"),
    }

    _engine: Any = None
    _asleep = False

    async def start(self, arguments: Mapping[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs

        from roll_vllm import environment, versions

        installed, device = versions.installed(), _device()
        assert installed is not None  # or there would be no vLLM to import
        self._version = installed.version
        own = {name: value for name, value in arguments.items() if name != "worker_name"}
        own.setdefault("load_format", "dummy")
        own["worker_extension_cls"] = "pytest_roll_vllm.targets.plain_worker.PlainWorker"
        own["enable_sleep_mode"] = self.capability("sleep").is_here(self._version, device, "")
        if environment.engine_generation(self._version, device, os.environ) == "V1":
            from vllm.v1.engine.async_llm import AsyncLLM as Engine
        else:
            from vllm.engine.async_llm_engine import AsyncLLMEngine as Engine
        self._engine = Engine.from_engine_args(AsyncEngineArgs(**own))

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = self._engine.generate(
            prompt, sampling_params, request_id=request_id, lora_request=lora_request
        )
        return outputs

    async def shutdown(self) -> None:
        end = getattr(self._engine, "shutdown", None) or getattr(self._engine, "shutdown_background_loop", None)
        if end is not None:
            end()

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._check("abort")
        for request_id in request_ids:
            await self._engine.abort(request_id)

    async def update(self, weights: Mapping[str, torch.Tensor], *, transport: str = "bucket", **options: Any) -> None:
        if transport != "bucket":
            raise self.refusal("update.collective")
        from safetensors.torch import save_file

        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=shared) as directory:
            path = Path(directory, "weights.safetensors")
            await asyncio.to_thread(save_file, dict(weights), path)
            await self._call("plain_load", str(path))

    async def sleep(self, level: int = 1) -> None:
        self._check("sleep.level2" if level == 2 else "sleep")
        await self._engine.sleep(level)
        self._asleep = True

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self._check("sleep" if tags is None else "sleep.tags")
        if self._asleep:
            await self._engine.wake_up(None if tags is None else list(tags))
        self._asleep = self._asleep and tags is not None

    async def pause_generation(self, mode: str = "abort") -> None:
        self._check("pause" if mode in ("abort", "wait") else "pause.keep")
        await self._engine.pause_generation(wait_for_inflight_requests=mode == "wait")

    async def resume_generation(self) -> None:
        self._check("pause")
        await self._engine.resume_generation()

    async def checksums(self) -> list[dict[str, str]]:
        return await self._call("plain_checksums")

    async def reset_prefix_cache(self) -> bool:
        self._check("cache.reset")
        return bool(await self._engine.reset_prefix_cache())

    def _check(self, name: str) -> None:
        """Raise unless the capability is there."""
        if not self.capability(name).is_here(self._version, _device(), ""):
            raise self.refusal(name)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker."""
        core = getattr(self._engine, "engine_core", None)
        results: list[Any]
        if core is not None:
            results = await core.collective_rpc_async(method, None, args, None)
        else:
            call = self._engine.engine.model_executor.collective_rpc
            results = await asyncio.to_thread(call, method, None, args)
        return results


def _device() -> str:
    from roll_vllm import devices

    return devices.detect().backend
