"""The command that runs one contract again."""

from __future__ import annotations

import shlex

import pytest

from pytest_roll_vllm.options import SETTINGS


def command(config: pytest.Config, id: str, label: str = "") -> str:
    """Return the command that runs the tests of one contract again, in the same way, on one run of several."""
    arguments = ["pytest"]
    if config.getoption("pyargs", False):
        arguments.append("--pyargs")
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        arguments += config.args
    settings = config.stash[SETTINGS]
    for name, setting in settings.all().items():
        if name == "version" and label:
            # A node of the user's has another label, and its version is for the user to choose.
            wanted = [one for one in settings.versions if label.startswith(f"{one}-")] or settings.versions
            arguments += [word for one in wanted for word in ("--vllm-version", one)]
        elif name == "provision" and setting.source.startswith("--"):
            arguments.append(setting.source)
        elif setting.source.startswith("--") and name != "report":
            lists = {"version": settings.versions, "expectations": map(str, settings.expectation_files)}
            values = lists.get(name, [setting.value])
            arguments += [word for value in values for word in (setting.source, value)]
    return shlex.join([*arguments, "-m", f'vllm_contract(id="{id}")'])
