"""Our engine as a target of the conformance suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

from pytest_roll_vllm.targets import CAPABILITIES, FULL, Capability, Support, Target
from tiny_rollout import TinyRollout

_LATER = Capability(Support.NOT_IMPLEMENTED, "tiny-rollout generates and takes weights, and nothing else")


class TinyTarget(Target):
    """Says what it has; everything else is refused by the base class."""

    name = "tiny"
    capabilities: ClassVar[Mapping[str, Capability]] = {
        **dict.fromkeys(CAPABILITIES, _LATER),
        "abort": FULL,
        "abort.partial": FULL,
        "checksum": FULL,
        "update": FULL,
    }
    _engine: TinyRollout | None = None

    async def start(self, arguments: Mapping[str, Any]) -> None:
        own = {name: value for name, value in arguments.items() if name != "worker_name"}
        self._engine = TinyRollout(load_format="dummy", **own)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        return self._engine.generate(prompt, sampling_params, request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._engine.abort(list(request_ids))

    async def update(self, weights: Mapping[str, Any], *, transport: str = "bucket", **options: Any) -> None:
        if transport != "bucket":
            raise self.refusal("update.collective")
        await self._engine.load(weights)

    async def checksums(self) -> list[dict[str, str]]:
        return await self._engine.checksums()

    async def shutdown(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
