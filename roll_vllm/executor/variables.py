"""The environment variables of one rank under Ray, and what it takes of its device. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from roll_vllm.errors import ConfigurationError

#: What a rank takes of its device unless the variable says otherwise: a trainer shares it.
SHARE = 0.01
SHARE_VARIABLE = "VLLM_RAY_PER_WORKER_GPUS"

#: Variables of the driver that workers get, by how they begin.
_COPIED = (
    "VLLM_", "ROLL_VLLM_", "HF_", "HUGGING_FACE_", "NCCL_", "GLOO_", "HCCL_", "ASCEND_", "FLASHINFER_", "PYTORCH_",
    "TORCHDYNAMO_", "TORCH_NCCL_", "TOKENIZERS_", "OMP_", "PYTHONPATH", "TRITON_", "XDG_CACHE_HOME",
)  # fmt: skip
_NOT_COPIED = ("VLLM_HOST_IP", "VLLM_HOST_PORT", "VLLM_PORT", "VLLM_RAY_BUNDLE_INDICES", "LOCAL_RANK")
#: Directories of which each rank has one of its own.
OF_ONE_RANK = ("VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE")


def rank_environment(rank: int, environ: Mapping[str, str], visibility: Sequence[str]) -> dict[str, str]:
    """The variables of one worker, before it is known where it runs. A new mapping at every call.

    Args:
        rank: the rank.
        environ: the driver's variables.
        visibility: the variables that show a process its devices; each worker gets its own.
    """
    excluded = {*_NOT_COPIED, *visibility, *_not_carried(environ)}
    changes = {
        name: value for name, value in environ.items() if name.startswith(_COPIED) and name not in excluded
    }  # fmt: skip
    for name in OF_ONE_RANK:
        if environ.get(name):
            changes[name] = str(Path(environ[name]) / f"rank{rank}")
    return changes


def _not_carried(environ: Mapping[str, str]) -> list[str]:
    """The names in the file by which vLLM's users keep variables from workers."""
    home = environ.get("VLLM_CONFIG_ROOT") or Path(environ.get("HOME") or Path.home(), ".config", "vllm")
    with suppress(FileNotFoundError):
        return list(json.loads(Path(home, "ray_non_carry_over_env_vars.json").read_text(encoding="utf-8")))
    return []


def share_of_device(environ: Mapping[str, str]) -> float:
    """How much of a device one rank takes.

    Raises:
        ConfigurationError: the variable is not a share.
    """
    text = environ.get(SHARE_VARIABLE, "").strip() or str(SHARE)
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise ConfigurationError(f"{SHARE_VARIABLE}={text!r} is not a share of a device: more than 0, at most 1")
