"""``report.md`` and ``report.html``: pages for people, made from the contents of ``report.json`` and nothing else.

``python -m pytest_roll_vllm.pages report.json`` makes them from a report that was kept; several reports become one
page, with a column for each version and backend. ``columns.py`` reads reports, ``markdown.py`` and ``html.py`` write
pages. Nothing here but :func:`write` has a side effect, and no text of a report is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_roll_vllm import files
from pytest_roll_vllm.pages.columns import columns
from pytest_roll_vllm.pages.html import html
from pytest_roll_vllm.pages.markdown import markdown

__all__ = ["columns", "html", "markdown", "write"]


def write(documents: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Write the pages of reports to a directory, each as a whole or not at all, and return their paths.

    Args:
        documents: The contents of ``report.json`` files.
        directory: Where to; it must exist.

    Raises:
        OSError: If it cannot be written to.
        ValueError: If one is not a report of a known schema.
    """
    found = columns(documents)
    written = []
    for name, text in (("report.md", markdown(found)), ("report.html", html(found))):
        path = directory / name
        files.write(path, text)
        written.append(path)
    return written
