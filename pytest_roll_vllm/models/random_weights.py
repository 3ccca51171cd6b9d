"""Random weights: no closed form, but logits that are spread out and depend on the whole context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_roll_vllm.models.base import Probe, check_version
from pytest_roll_vllm.models.synthetic import SyntheticModel

if TYPE_CHECKING:
    import torch

LOGIT_STD = 2.0


class RandomModel(SyntheticModel):
    """Normal weights that keep activations near 1 and give logits a standard deviation of about 2."""

    def __init__(self, name: str, cache_dir: Path, dtype: str = "float32") -> None:
        super().__init__(name, name.endswith("-tied"), cache_dir, dtype)

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        rng = self.rng(version)
        output = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        tensors = {}
        for name, shape in self.shapes().items():
            values = rng.standard_normal(shape, dtype=np.float32)
            if name.endswith("norm.weight"):
                values = 1 + 0.1 * values
            elif name == output:
                values *= LOGIT_STD * shape[-1] ** -0.5
            elif name.endswith("bias"):
                values *= 0.1
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                values *= 2 * shape[-1] ** -0.5  # scores near 4: heads choose, instead of taking the average
            elif not name.endswith("embed_tokens.weight"):
                values *= shape[-1] ** -0.5
            tensors[name] = torch.from_numpy(values).to(getattr(torch, self.dtype))
        return tensors

    def probes(self, version: int) -> list[Probe]:
        """Return no probes: the reference forward pass is the judge here."""
        check_version(version)
        return []
