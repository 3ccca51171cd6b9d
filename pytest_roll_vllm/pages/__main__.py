"""``python -m pytest_roll_vllm.pages``: the pages of reports that were kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_roll_vllm import pages


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages; returns 0, or 2 if a file cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_roll_vllm.pages",
        description="Write report.md and report.html from report.json; several reports become the columns of one page.",
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="a report.json, or its directory")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to (default: beside the first report)")
    options = parser.parse_args(arguments)
    paths = [path / "report.json" if path.is_dir() else path for path in options.reports]
    output = options.output or paths[0].parent
    try:
        documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        output.mkdir(parents=True, exist_ok=True)
        written = pages.write(documents, output)
    except (OSError, ValueError) as error:
        print(f"cannot make pages of {', '.join(map(str, paths))}: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
