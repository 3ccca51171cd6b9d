"""A real headless browser, and pages to show it. Without a browser its tests fail: whoever starts them wants one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # for plugin_harness and report_sample

from plugin_harness import Inner

pytest_plugins = ["pytester"]

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    """pytest with the plugin, and no other that was not asked for, in a clean place."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(pytester.path / "xdg"))
    return Inner(pytester, monkeypatch)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium: the one in ``BROWSER_TEST_PROGRAM``, one on ``PATH``, or Playwright's own."""
    from playwright.sync_api import Error, sync_playwright

    program = os.environ.get("BROWSER_TEST_PROGRAM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    with sync_playwright() as playwright:
        try:
            # Its sandbox does not start for root, as in most containers; the pages are our own.
            found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] if _is_root() else [])
        except Error as error:
            pytest.fail(
                f"no browser starts ({program or 'none on PATH'}): {str(error).splitlines()[0]}. Install one: `apt-get "
                "install chromium-headless-shell`, or `playwright install --only-shell chromium`; or name one in "
                "BROWSER_TEST_PROGRAM.",
                pytrace=False,
            )
        yield found
        found.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``show(document, width=..., dark=...)`` shows the page of a report, without a network.

    After the test: the page has asked for nothing but itself, and nothing was written to the console.
    """
    from pytest_roll_vllm import pages

    contexts, requests, complaints = [], [], []

    def open(document: dict[str, Any], *, width: int = 1200, dark: bool = False, script: bool = True) -> Any:
        _, path = pages.write([document], tmp_path)
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if dark else "light",
            offline=True,
            java_script_enabled=script,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url.partition("#")[0]))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(path.as_uri())
        assert set(requests) == {path.as_uri()}
        return page

    yield open
    for context in contexts:
        context.close()
    assert len(requests) == len(contexts)
    assert complaints == []


def _is_root() -> bool:
    return os.geteuid() == 0
