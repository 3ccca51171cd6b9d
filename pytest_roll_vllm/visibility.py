"""Which devices an xdist worker uses: its share of those the caller may see, never others."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: The variable that hides devices, by kind.
VARIABLES = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}


def share_of(worker: str | None, kind: str, count: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variable that limits an xdist worker to one device.

    Args:
        worker: ``gw3`` for the fourth worker; None without xdist.
        kind: the kind of device.
        count: how many of them the caller may see.
        environ: where the caller's own limit is found; its entries may be indices or UUIDs.

    Returns:
        One variable, or nothing where there is nothing to share.
    """
    index = re.fullmatch(r"gw(\d+)", worker or "")
    variable = VARIABLES.get(kind)
    if index is None or variable is None or count == 0:
        return {}
    visible = [entry.strip() for entry in environ.get(variable, "").split(",") if entry.strip()]
    visible = visible or [str(number) for number in range(count)]
    return {variable: visible[int(index[1]) % len(visible)]}
