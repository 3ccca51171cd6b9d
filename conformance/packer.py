"""A trainer's own process, which may see the devices by other numbers: packs weights on each of them into buckets.

Run as ``python -m conformance.packer CACHE_DIR MODEL DTYPE WORKERS VERSION...``, with the identities of the workers'
devices as JSON. For each bucket it prints the device, the version and the payloads of all ranks as JSON, and reads a
line when the engine has taken them. Its last line is ``done``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(cache_dir: str, model: str, dtype: str, workers: str, *versions: str) -> None:
    """Do what the module says."""
    import torch

    from pytest_roll_vllm.models import make
    from roll_vllm import BucketSender

    made = make(model, Path(cache_dir), dtype)
    for index in range(torch.cuda.device_count()):
        for version in map(int, versions):
            weights = {name: tensor.to(f"cuda:{index}") for name, tensor in made.weights(version).items()}
            with BucketSender() as sender:
                for payloads in sender.payloads_for(weights, json.loads(workers)):
                    print(index, version, json.dumps([payload.decode() for payload in payloads]), flush=True)
                    sys.stdin.readline()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
