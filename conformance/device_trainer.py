"""A trainer's own process on the engine's GPU: moves a checkpoint into device memory that engines can map.

Run as ``python -m conformance.device_trainer CHECKPOINT.safetensors``; prints one payload a line, in base64, then an
empty one, and keeps the memory until it is killed.
"""

from __future__ import annotations

import base64
import sys
import time


def main(checkpoint: str) -> None:
    """Do what the module says."""
    from safetensors.torch import load_file

    from roll_vllm import BucketSender

    sender = BucketSender()
    weights = load_file(checkpoint, device="cuda:0")
    sender.share(weights)
    for payload in sender.payloads(weights):
        print(base64.b64encode(payload).decode(), flush=True)
    print(flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
