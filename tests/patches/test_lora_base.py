"""On CPUs, tokens without an adapter get none, also beside tokens with one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

HIDDEN, RANK, VOCABULARY = 8, 2, 16


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wrapper(kind: Any, indices: list[int]) -> Any:
    """As much of vLLM's wrapper as one call needs, for tokens whose adapters have these indices."""
    self = kind.__new__(kind)
    kind.__init__(self, 64, 8, torch.device("cpu"), lora_config=SimpleNamespace(specialize_active_lora=False))
    index = torch.tensor(indices)
    self._token_lora_indices[: len(index)] = index
    self._sampler_indices[: len(index)] = index
    self.indices_len[:4] = [len(index)] * 4
    self.is_prefill, self.no_lora = False, False
    return self


@pytest.mark.parametrize("what", ["linear", "embedding", "logits"])
def test_the_base_is_spared(patched: Callable[[str], Any], what: str) -> None:
    kind = patched(f"lora-spares-base-{what}")
    indices = [-1, 0, -1, 0, 0]
    x = drawn(len(indices), HIDDEN, seed=1)
    y = drawn(len(indices), VOCABULARY, seed=2)
    down, up = drawn(1, 1, RANK, HIDDEN, seed=3), drawn(1, 1, VOCABULARY, RANK, seed=4)
    change = (x @ down[0, 0].T) @ up[0, 0].T
    result = y.clone()
    self = wrapper(kind, indices)
    if what == "linear":
        arguments = {"scale": 1.0, "output_slices": (VOCABULARY,)}
        try:
            self.add_lora_linear(result, x, (down,), (up,), **arguments)
        except TypeError:  # up to 0.10.2 adapters may have a bias
            self.add_lora_linear(result, x, (down,), (up,), None, **arguments)
    elif what == "embedding":
        self.add_lora_embedding(result, x @ down[0, 0].T, up)
        change = (x @ down[0, 0].T) @ up[0, 0].T
    else:
        self.add_lora_logits(result, x, down, up, scale=1.0)
    for row, index in enumerate(indices):
        expected = y[row] if index < 0 else y[row] + change[row]
        torch.testing.assert_close(result[row], expected, rtol=1e-4, atol=1e-4)
