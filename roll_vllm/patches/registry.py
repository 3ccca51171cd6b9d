"""Every patch there is. One file a behaviour; a target that moved has two entries with disjoint ranges."""

from __future__ import annotations

from roll_vllm.patches import abort
from roll_vllm.patches.patch import Patch

PATCHES: tuple[Patch, ...] = (*abort.PATCHES,)
