"""The integration that is to be tested: a thin wrapper around vLLM, as many projects have one."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any


class TinyRollout:
    """Generates, and takes new weights from a trainer in the same process."""

    def __init__(self, **engine_args: Any) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        extension = {"worker_extension_cls": "tiny_rollout.worker.LoadsWeights"}
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args, **extension))

    def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        """As vLLM's."""
        return self._llm.generate(prompt, sampling_params, request_id=request_id)

    async def abort(self, request_ids: list[str]) -> None:
        """End requests."""
        await self._llm.abort(request_ids)

    async def load(self, weights: Mapping[str, Any]) -> None:
        """Replace all weights; what was cached for the old ones goes."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "weights.safetensors")
            await asyncio.to_thread(save_file, dict(weights), path)
            await self._llm.reset_prefix_cache()
            await self._llm.collective_rpc("tiny_load", args=(str(path),))

    async def checksums(self) -> list[dict[str, str]]:
        """Of every tensor of the model, for each rank."""
        return await self._llm.collective_rpc("tiny_checksums")

    def shutdown(self) -> None:
        """End vLLM's processes."""
        self._llm.shutdown()
