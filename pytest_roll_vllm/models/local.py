"""Any HF model in a local directory: version 0 is what the files hold, later versions are perturbed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_roll_vllm.models.base import Model, Probe, check_version
from roll_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    import torch

STRENGTH = 0.2  # of the perturbation, relative to the root mean square of the tensor


class LocalModel(Model):
    """A directory with ``config.json``, a tokenizer and safetensors.

    Raises:
        ConfigurationError: the directory cannot be used; the message says why and what to do.
    """

    reference_version = 0

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path.resolve()
        self.name = name or str(self.path)
        config = _read_json(self.path / "config.json")
        text = config.get("text_config", config)
        self._files = _weight_files(self.path)
        names = {tensor for file in self._files for tensor in _tensor_names(file)}
        self.tied = bool(config.get("tie_word_embeddings", "lm_head.weight" not in names))
        self._names = names - {"lm_head.weight"} if self.tied else names
        self.dtype = str(text.get("torch_dtype") or text.get("dtype") or "float32")
        try:
            self.vocab_size = int(text["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{self.path / 'config.json'} has no vocab_size; name the directory of a language model"
            ) from error

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        """Return the tensors of the files (version 0), or the same with noise on every tensor.

        Raises:
            ValueError: ``version`` is negative.
            ConfigurationError: a tensor of integers (a quantised model) was to be perturbed.
        """
        import numpy as np
        from safetensors import safe_open

        check_version(version)
        tensors: dict[str, torch.Tensor] = {}
        for file in self._files:
            with safe_open(file, framework="pt") as content:
                for name in sorted(self._names.intersection(content.keys())):
                    tensor = content.get_tensor(name)
                    if version == 0:
                        tensors[name] = tensor.clone()  # of a storage that all tensors of the file share
                    elif tensor.is_floating_point():
                        tensors[name] = _perturbed(tensor, np.random.default_rng([version, *name.encode()]))
                    else:
                        raise ConfigurationError(
                            f"{self.path} holds {name} as {tensor.dtype}, so no other version can be made of "
                            "it; use a model that is not quantised"
                        )
        return tensors

    def probes(self, version: int) -> list[Probe]:
        """Return no probes: nothing is known about this model."""
        check_version(version)
        return []


def _perturbed(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return ``tensor`` plus noise."""
    import numpy as np
    import torch

    values = tensor.float()
    size = float(values.square().mean().sqrt()) or 0.1
    noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
    return noise.mul_(STRENGTH * size).add_(values).to(tensor.dtype)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{file.parent} has no {file.name}; name the directory of a HF model (see save_pretrained)"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error}; check its permissions") from error
    except ValueError as error:
        raise ConfigurationError(f"{file} is not JSON: {error}; download or save the model again") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file} holds no JSON object; download or save the model again")
    return content


def _weight_files(path: Path) -> list[Path]:
    """Return the safetensors that make up the checkpoint: those of the index, or the single file, or all."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = _read_json(index).get("weight_map", {})
        return [path / shard for shard in sorted(set(shards.values()))]
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(
            f"{path} has no *.safetensors, and other formats are not read; "
            "save the model with save_pretrained(..., safe_serialization=True)"
        )
    return files


def _tensor_names(file: Path) -> list[str]:
    """Return the names in the header of a safetensors file, without reading the tensors."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise ConfigurationError(
            f"{file} is not a readable safetensors file: {error}; download or save the model again"
        ) from error
    return [name for name in header if name != "__metadata__"]
