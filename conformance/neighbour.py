"""A process that shares the first device: takes a GiB and gives it back, again and again, until it is killed.

Run as ``python -m conformance.neighbour DEVICE``, such as ``cuda``; prints a line when it has begun.
"""

from __future__ import annotations

import sys
import time

GIB = 2**30


def main(device: str) -> None:
    """Do what the module says."""
    import torch

    memory = torch.get_device_module(device)
    while True:
        taken = torch.zeros(GIB, dtype=torch.uint8, device=device)
        memory.synchronize()
        print("taken", flush=True)
        time.sleep(0.3)
        del taken
        memory.empty_cache()
        time.sleep(0.3)


if __name__ == "__main__":
    main(*sys.argv[1:])
