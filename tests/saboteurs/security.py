"""Breakages of what keeps others out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.saboteurs.base import in_worker, saboteur

in_worker("unpickle-payloads", "sec-no-foreign-pickle")
in_worker("listen-everywhere", "sec-control-not-exposed")


@saboteur("sec-no-foreign-pickle")
@contextmanager
def sends_whatever_it_is_given(engine: Any) -> Iterator[None]:
    """Arguments of remote calls are not looked at."""
    with patch("roll_vllm.engine._require_plain", lambda method, value: None):
        yield
