"""The console script ``roll-vllm``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from roll_vllm.doctor import command as doctor
from roll_vllm.errors import RollVllmError
from roll_vllm.patches import command as patches

#: Modules with ``add_to(commands)``, which declares a command and sets ``run(options) -> status`` on its parser.
_COMMANDS = (doctor, patches)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 if the command found something wrong, or 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="roll-vllm", description="Looks after vLLM as a rollout engine.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except RollVllmError as error:
        print(f"roll-vllm: {error}", file=sys.stderr)
        return 2
    return status
