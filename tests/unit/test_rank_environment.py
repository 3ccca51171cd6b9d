"""What the environment of a rank under Ray is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roll_vllm.errors import ConfigurationError
from roll_vllm.executor.variables import rank_environment, share_of_device

DRIVER = {
    "VLLM_CACHE_ROOT": "/cache/worker",
    "FLASHINFER_WORKSPACE_BASE": "/cache/worker",
    "VLLM_PORT": "1234",
    "VLLM_HOST_IP": "10.0.0.1",
    "VLLM_HOST_PORT": "1",
    "VLLM_RAY_BUNDLE_INDICES": "1,0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    "ROLL_VLLM_RECORDS": "/tmp/records",
    "PYTORCH_CUDA_ALLOC_CONF": "",
    "NCCL_DEBUG": "INFO",
    "HF_TOKEN": "secret",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    "LOCAL_RANK": "3",
    "HOME": "/home/me",
    "PATH": "/bin",
    "RAY_ADDRESS": "10.0.0.1:6379",
    "PYTHONPATH": "/src",
}
VISIBILITY = ("CUDA_VISIBLE_DEVICES",)


def test_what_a_worker_gets_and_what_it_does_not(tmp_path: Path) -> None:
    got = rank_environment(1, {**DRIVER, "VLLM_CONFIG_ROOT": str(tmp_path)}, VISIBILITY)
    assert got == {
        "VLLM_CONFIG_ROOT": str(tmp_path),
        "VLLM_CACHE_ROOT": "/cache/worker/rank1",
        "FLASHINFER_WORKSPACE_BASE": "/cache/worker/rank1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "ROLL_VLLM_RECORDS": "/tmp/records",
        "PYTORCH_CUDA_ALLOC_CONF": "",  # an empty value keeps the node's own out
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "secret",
        "PYTHONPATH": "/src",
    }


def test_each_rank_has_a_mapping_of_its_own() -> None:
    first, second = (rank_environment(rank, DRIVER, VISIBILITY) for rank in (0, 1))
    first["VLLM_PORT"] = "1"
    assert "VLLM_PORT" not in second
    assert first["VLLM_CACHE_ROOT"] != second["VLLM_CACHE_ROOT"]


def test_names_that_the_user_keeps_from_workers(tmp_path: Path) -> None:
    (tmp_path / "ray_non_carry_over_env_vars.json").write_text(json.dumps(["NCCL_DEBUG", "HF_TOKEN"]))
    got = rank_environment(0, {**DRIVER, "VLLM_CONFIG_ROOT": str(tmp_path)}, VISIBILITY)
    assert "NCCL_DEBUG" not in got
    assert "HF_TOKEN" not in got
    home = tmp_path / "home"
    (home / ".config" / "vllm").mkdir(parents=True)
    (home / ".config" / "vllm" / "ray_non_carry_over_env_vars.json").write_text(json.dumps(["NCCL_DEBUG"]))
    got = rank_environment(0, {**DRIVER, "HOME": str(home)}, VISIBILITY)
    assert "NCCL_DEBUG" not in got
    assert "HF_TOKEN" in got


@pytest.mark.parametrize(("value", "share"), [(None, 0.01), ("", 0.01), (" ", 0.01), ("1", 1.0), ("0.5", 0.5)])
def test_share(value: str | None, share: float) -> None:
    assert share_of_device({} if value is None else {"VLLM_RAY_PER_WORKER_GPUS": value}) == share


@pytest.mark.parametrize("value", ["0", "-1", "2", "half", "nan", "inf"])
def test_no_share(value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"VLLM_RAY_PER_WORKER_GPUS='{value}'"):
        share_of_device({"VLLM_RAY_PER_WORKER_GPUS": value})
