"""Every patch there is. One file a behaviour; a target that moved has two entries with disjoint ranges."""

from __future__ import annotations

from roll_vllm.patches import (
    abort,
    cpu_norms,
    fp8_qkv,
    lora_base,
    lora_tensors,
    moe_reload,
    profiling,
    sleep_buffers,
    start_memory,
    survival,
    visible_devices,
)
from roll_vllm.patches.patch import Patch

PATCHES: tuple[Patch, ...] = (
    *abort.PATCHES,
    *cpu_norms.PATCHES,
    *fp8_qkv.PATCHES,
    *lora_base.PATCHES,
    *lora_tensors.PATCHES,
    *moe_reload.PATCHES,
    *profiling.PATCHES,
    *sleep_buffers.PATCHES,
    *start_memory.PATCHES,
    *survival.PATCHES,
    *visible_devices.PATCHES,
)
