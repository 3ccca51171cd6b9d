"""Writes README.md in docs/results, the list of the runs that are on record there.

``python docs/generate_results.py`` writes the page; with ``--check`` it only says whether it is up to date. The folder
of a run holds the suite's own ``report.json`` and ``report.md`` as the run left them, and ``host.json`` with what they
do not know: the driver, the commit of this project, and what else must be said of the run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COMMAND = "python docs/generate_results.py"
NOTICE = f"<!-- Written by {COMMAND}; do not edit. -->\n"


def page() -> str:
    """Return the text of the page."""
    rows, notes = [], []
    for path in sorted(RESULTS.glob("*/report.json")):
        report, host = json.loads(path.read_text("utf-8")), json.loads((path.parent / "host.json").read_text("utf-8"))
        name = path.parent.name
        rows.append([f"[{name}]({name}/report.md)", *_facts(report, host).values(), _totals(report)])
        notes.extend(f"- {name}: {note}\n" for note in host.get("notes", ()))
    table = _table([["run", *_facts(None, None), "contracts"], *rows])
    return "\n".join(filter(None, ["# Runs on accelerators\n", NOTICE, table, "".join(notes)]))


def _facts(report: Any, host: Any) -> dict[str, str]:
    if report is None:
        return dict.fromkeys(("vLLM", "engine", "torch", "model", "device", "driver", "date", "commit"), "")
    return {
        "vLLM": report["vllm"]["version"],
        "engine": report["engine"],
        "torch": report["torch"],
        "model": report["model"],
        "device": ", ".join(f"{count} x {name}" for name, count in Counter(report["device"]["names"]).items()),
        "driver": host["driver"],
        "date": report["date"][:10],
        "commit": host["commit"][:10],
    }


def _totals(report: Any) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in report["totals"].items() if count)


def _table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> int:
    path, text = RESULTS / "README.md", page()
    if "--check" not in sys.argv[1:]:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        print(f"{path.name} is not up to date; write it again: {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
