"""A user's own script, for the tests that kill it: starts an engine, says so, and waits.

Run as ``python -m conformance.parent '{"model": ...}'`` with engine arguments as JSON; prints one line of
JSON when the engine is up.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys


async def main(arguments: str) -> None:
    from roll_vllm import create_async_llm

    engine = await create_async_llm(**json.loads(arguments))
    workers = [worker.pid for worker in (await engine.state()).workers]
    print(json.dumps({"pid": os.getpid(), "workers": workers}), flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
