"""What vLLM's workers need for it."""

from __future__ import annotations

from typing import Any


class LoadsWeights:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def tiny_load(self, path: str) -> None:
        """Load the tensors of a safetensors file."""
        from safetensors.torch import load_file

        self.model_runner.model.load_weights(load_file(path).items())

    def tiny_checksums(self) -> dict[str, str]:
        """As the suite compares them."""
        from roll_vllm.worker.checksums import model_checksums

        return model_checksums(self.model_runner.model)
