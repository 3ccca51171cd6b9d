"""What the suite needs to know about a model, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Probe:
    """A prompt whose greedy continuation is known in advance."""

    prompt_token_ids: list[int]
    expected_token_ids: list[int]


class Model(ABC):
    """A causal language model with as many versions of its weights as a test asks for.

    ``path`` is a directory that an engine can be started on with dummy weights: ``config.json``,
    ``generation_config.json`` and the tokenizer. It holds safetensors only where the kind says so.
    """

    name: str
    """The kind (``counting``, ...) or, for a directory, its path."""
    path: Path
    dtype: str
    """The dtype that the configuration asks for: ``float32``, ``bfloat16``, ..."""
    tied: bool
    """Whether ``lm_head`` shares the weights of ``embed_tokens``; then ``weights()`` holds no ``lm_head``."""
    vocab_size: int
    reference_version: int = 1
    """The version that tests start from; 0 where the weights are real ones, and the others made from them."""

    @abstractmethod
    def weights(self, version: int) -> dict[str, torch.Tensor]:
        """Return the complete checkpoint of one version: names as in a HF checkpoint, fresh CPU tensors.

        The tensors are contiguous and share no storage. The same version always gives the same values, and
        between two versions every tensor differs in nearly all of its elements.

        Raises:
            ValueError: ``version`` is negative.
        """

    @abstractmethod
    def probes(self, version: int) -> list[Probe]:
        """Return prompts whose greedy continuation under ``weights(version)`` is known; may be empty.

        Raises:
            ValueError: ``version`` is negative.
        """


def check_version(version: int) -> None:
    """Raise ValueError unless ``version`` can name weights."""
    if version < 0:
        raise ValueError(f"a weight version is 0 or more, not {version}")
