"""A trainer's own process, for the tests that kill it: rank 0 of a group, which stops at a stage and says so.

Run as ``python -m conformance.trainer STAGE PORT WORLD_SIZE GROUP_NAME DTYPES_AND_SHAPES``; the last is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

#: Before the handshake is over; after it; and when the ranks have agreed on the tensors, of which none is sent.
STAGES = ("listens", "joined", "agreed")


def main(stage: str, port: str, world_size: str, group_name: str, tensors: str) -> None:
    """Do what the module says."""
    import torch

    from roll_vllm import CollectiveSender
    from roll_vllm.transfer.collective import _listening_store

    if stage == "listens":
        kept = _listening_store("127.0.0.1", int(port), int(world_size), timedelta(seconds=60))
    else:
        kept = CollectiveSender("127.0.0.1", int(port), int(world_size), group_name, "gloo")
    if stage == "agreed":
        shapes = json.loads(tensors)
        kept._group._agree([torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in shapes])
    print(stage, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
