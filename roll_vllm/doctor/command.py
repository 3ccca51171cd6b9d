"""``roll-vllm doctor``, as typed and as printed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import Any, TextIO

from roll_vllm.doctor.diagnosis import Diagnosis, Status, diagnose

_COLOURS: dict[Status, str] = {"ok": "32", "warning": "33", "problem": "31"}


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed, what is wrong with it, and what to do next",
        description="Looks at this environment and machine without importing torch or vLLM. The status is 1 if there "
        "is a problem, and 0 if there are warnings at most.",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    diagnosis = diagnose()
    if options.json:
        print(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        print(render(diagnosis, colour=colourful(sys.stdout, os.environ), width=shutil.get_terminal_size().columns))
    return 1 if diagnosis.status == "problem" else 0


def colourful(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether to print in colour: on a terminal that has some, unless ``NO_COLOR`` is set and not empty."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def render(diagnosis: Diagnosis, *, colour: bool = False, width: int = 110) -> str:
    """Write a diagnosis for people. Commands stand on a line of their own, and are never broken."""

    def paint(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    lines = [_headline(diagnosis), ""]
    names = max(len(finding.check) for finding in diagnosis.findings)
    indent = " " * (9 + names + 2)
    for finding in diagnosis.findings:
        text = textwrap.wrap(finding.message, max(width - len(indent), 40), break_on_hyphens=False) or [""]
        status = paint(f"{finding.status:<9}", _COLOURS[finding.status])
        lines.append(f"{status}{finding.check:<{names}}  {text[0]}")
        lines += [indent + line for line in text[1:]]
        if finding.remedy:
            lines.append(f"{indent}$ {finding.remedy}")
    count = Counter(finding.status for finding in diagnosis.findings)
    said = [f"{count[one]} {one}{'' if count[one] == 1 else 's'}" for one in ("problem", "warning") if count[one]]
    lines += ["", ", ".join(said) or "all is well", f"next: {paint(diagnosis.next, '1')}"]
    return "\n".join(lines)


def _headline(diagnosis: Diagnosis) -> str:
    vllm = f"{diagnosis.vllm.distribution} {diagnosis.vllm.version}" if diagnosis.vllm else "no vLLM"
    row = f"row {diagnosis.row}" if diagnosis.row else "in no row" if diagnosis.vllm else ""
    backend = f"backend {diagnosis.device.backend}" if diagnosis.device else "no backend"
    engine = f"engine {diagnosis.engine}" if diagnosis.engine else ""
    own = f"roll-vllm {diagnosis.roll_vllm or '(not installed)'}"
    return ", ".join(filter(None, [own, vllm, row, backend, engine, f"Python {diagnosis.python}"]))
