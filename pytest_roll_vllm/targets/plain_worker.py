"""The worker extension of the target ``vllm``: what a user of plain vLLM would write."""

from __future__ import annotations

from typing import Any


class PlainWorker:
    """Mixed into vLLM's worker by ``worker_extension_cls``."""

    model_runner: Any

    def plain_load(self, path: str) -> None:
        """Load the checkpoint tensors of a safetensors file."""
        from safetensors.torch import load_file

        self.model_runner.model.load_weights(load_file(path).items())

    def plain_checksums(self) -> dict[str, str]:
        """A checksum of each tensor of the model."""
        from roll_vllm.worker.checksums import model_checksums

        return model_checksums(self.model_runner.model)
