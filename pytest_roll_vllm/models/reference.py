"""The reference: what ``transformers`` computes on the CPU with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_roll_vllm.models.base import Model

if TYPE_CHECKING:
    import torch


class ReferenceModel:
    """A forward pass that owes nothing to vLLM.

    Args:
        model: Whose configuration and weights to use.
        dtype: In what to compute: ``float32`` or, to see the rounding of the engine, ``model.dtype``.
    """

    def __init__(self, model: Model, dtype: str = "float32") -> None:
        self._model = model
        self._dtype = dtype
        self._network: Any = None
        self._version: int | None = None

    def logprobs(self, token_ids: list[list[int]], version: int) -> list[torch.Tensor]:
        """Return one tensor per sequence, float32 [len - 1, vocab], for temperature 1.

        Row i is the log-softmax over what may follow tokens 0 to i.
        """
        self._ensure(version)
        return [self.logits(tokens)[:-1].log_softmax(dim=-1) for tokens in token_ids]

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Return float32 [len, vocab], under the weights that were loaded last."""
        import torch

        with torch.inference_mode():
            logits: torch.Tensor = self._network(torch.tensor([token_ids])).logits[0]
        return logits.float()

    def greedy(self, prompt_token_ids: list[int], max_tokens: int, version: int) -> list[int]:
        """Return the ``max_tokens`` most likely tokens, one by one; end-of-sequence does not stop it."""
        import torch

        self._ensure(version)
        tokens: list[int] = []
        step, past = torch.tensor([prompt_token_ids]), None
        with torch.inference_mode():
            while len(tokens) < max_tokens:
                output = self._network(step, past_key_values=past, use_cache=True)
                tokens.append(int(output.logits[0, -1].argmax()))
                step, past = torch.tensor([tokens[-1:]]), output.past_key_values
        return tokens

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Load any checkpoint, for example a damaged one; the next call with a version loads that version.

        Raises:
            RuntimeError: a tensor is missing, unknown or of the wrong shape.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if self._network is None:
            config = AutoConfig.from_pretrained(self._model.path)
            self._network = AutoModelForCausalLM.from_config(config).eval()
            for parameter in self._network.parameters():  # not .to(): RoPE's buffers stay in float32
                parameter.data = parameter.data.to(getattr(torch, self._dtype))
        self._version = None
        result = self._network.load_state_dict(weights, strict=False)
        every = {name for name, _ in self._network.named_parameters(remove_duplicate=False)}
        tied = every - {name for name, _ in self._network.named_parameters()}
        missing = sorted(set(result.missing_keys) - tied)
        if missing or result.unexpected_keys:
            raise RuntimeError(f"missing tensors: {missing}; unknown tensors: {result.unexpected_keys}")

    def _ensure(self, version: int) -> None:
        if version != self._version:
            self.load(self._model.weights(version))
            self._version = version
