"""A trainer's own process, for the tests that kill it: joins a group as rank 0, says so, and sends nothing.

Run as ``python -m conformance.trainer PORT WORLD_SIZE GROUP_NAME``.
"""

from __future__ import annotations

import sys
import time


def main(port: str, world_size: str, group_name: str) -> None:
    """Do what the module says."""
    from roll_vllm import CollectiveSender

    sender = CollectiveSender("127.0.0.1", int(port), int(world_size), group_name, "gloo")
    print("joined", flush=True)
    time.sleep(600)
    sender.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
