"""Texts of a report, made fit for a page."""

from __future__ import annotations

import re

_LINES = 20


def clean(value: object) -> str:
    """Return a text without the colours of a terminal, control characters and what UTF-8 cannot hold."""
    plain = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", str(value))
    plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", plain)
    return plain.encode("utf-8", "replace").decode("utf-8")


def bounded(text: str) -> str:
    """Return the beginning of a long text; the whole is in ``report.json``."""
    lines = text.splitlines()
    return "\n".join([*lines[:_LINES], f"... ({len(lines) - _LINES} more lines)"] if len(lines) > _LINES else lines)


def link(reference: str) -> str:
    """Return the address of a reference, such as ``vllm-project/vllm#22197``, or nothing if it has none."""
    issue = re.fullmatch(r"([\w.-]+/[\w.-]+)#(\d+)", reference)
    if issue:
        return f"https://github.com/{issue[1]}/issues/{issue[2]}"
    return reference if re.fullmatch(r"https?://[^\s<>\"'`]+", reference) else ""
