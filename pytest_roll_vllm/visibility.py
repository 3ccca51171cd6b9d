"""Which devices an xdist worker uses: its share of those the caller may see, never others."""

from __future__ import annotations

import re
from collections.abc import Mapping

from roll_vllm.backends import BACKENDS

#: The variables that hide devices, by kind; the first that is set counts.
VARIABLES: dict[str, tuple[str, ...]] = {
    backend.kind: backend.visibility[-1] for backend in BACKENDS.values() if backend.visibility
}


def share_of(worker: str | None, kind: str, count: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that limit an xdist worker to one device.

    Args:
        worker: ``gw3`` for the fourth worker; None without xdist.
        kind: the kind of device.
        count: how many of them the caller may see.
        environ: where the caller's own limit is found; its entries may be indices or UUIDs.

    Returns:
        The variables, or nothing where there is nothing to share.
    """
    index = re.fullmatch(r"gw(\d+)", worker or "")
    if index is None or kind not in VARIABLES or count == 0:
        return {}
    # All that are set: vLLM on ROCm refuses to start when they differ.
    names = [name for name in VARIABLES[kind] if name in environ] or VARIABLES[kind][:1]
    visible = [entry.strip() for entry in environ.get(names[0], "").split(",") if entry.strip()][:count]
    visible = visible or [str(number) for number in range(count)]
    return dict.fromkeys(names, visible[int(index[1]) % len(visible)])
