"""Every patch there is. One file a behaviour; a target that moved has two entries with disjoint ranges."""

from __future__ import annotations

from roll_vllm.patches import abort, fp8_qkv, lora_tensors, moe_reload, sleep_buffers, visible_devices
from roll_vllm.patches.patch import Patch

PATCHES: tuple[Patch, ...] = (
    *abort.PATCHES,
    *fp8_qkv.PATCHES,
    *lora_tensors.PATCHES,
    *moe_reload.PATCHES,
    *sleep_buffers.PATCHES,
    *visible_devices.PATCHES,
)
