"""What contracts there are: ``--vllm-contracts`` lists those of the selected tests, and runs nothing.

``docs/generate_contracts.py`` writes its page from the same catalogue.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from _pytest.main import wrap_session

from pytest_roll_vllm import markers
from pytest_roll_vllm.contracts import Contract
from pytest_roll_vllm.options import SUITE, option_of

_QUIET = -2  # pytest's own lines are off: the list is the output


@dataclass
class Entry:
    """A contract and its tests.

    Attributes:
        contract: The declaration.
        tests: How many tests each of its test functions makes, by the function's name.
        on_request: How many of them run only if a setting is given, by its name.
    """

    contract: Contract
    tests: Counter[str] = field(default_factory=Counter)
    on_request: Counter[str] = field(default_factory=Counter)


@dataclass
class Module:
    """A test module with its contracts by id, both in the order of the file.

    Attributes:
        summary: The first sentences of its docstring, in one line.
        entries: The contracts.
    """

    summary: str
    entries: dict[str, Entry] = field(default_factory=dict)


def modules(items: Iterable[pytest.Item]) -> dict[str, Module]:
    """Return the modules of collected tests that have contracts, by name."""
    found: dict[str, Module] = {}
    # They come in the order in which they share engines.
    for item in sorted(items, key=lambda item: (item.path, item.location[1] or 0)):
        contract = item.stash.get(markers.CONTRACT_KEY, None)
        if contract is None:
            continue
        module: Any = getattr(item, "module", None)
        name = getattr(module, "__name__", item.location[0])
        entries = found.setdefault(name, Module(summary(module))).entries
        entry = entries.setdefault(contract.id, Entry(contract))
        entry.tests[item.nodeid.partition("::")[2].partition("[")[0]] += 1
        entry.on_request.update(dict.fromkeys(markers.calls(item, "vllm_on_request"), 1))
    return found


def summary(documented: Any) -> str:
    """Return the first paragraph of a docstring, in one line."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")


def show(config: pytest.Config) -> int | pytest.ExitCode:
    """List the contracts of the selected tests, those of the suite unless the command line names others.

    Returns:
        The exit status: ``OK``, or ``NO_TESTS_COLLECTED`` if there are none.
    """
    quiet = config.option.verbose < 0
    config.option.verbose = _QUIET
    config.option.collectonly = True  # for plugins that would start something, such as processes
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args[:] = [SUITE]
        config.option.pyargs = True
    return wrap_session(config, partial(_show, quiet=quiet))


def _show(config: pytest.Config, session: pytest.Session, *, quiet: bool) -> pytest.ExitCode:
    config.option.collectonly = False  # pytest would list the tests
    session.perform_collect()
    if session.testsfailed:
        raise session.Interrupted(f"{session.testsfailed} errors during collection")
    found = modules(session.items)
    writer = config.get_terminal_writer()
    config.pluginmanager.unregister(name="terminalreporter")  # it has nothing to sum up
    for line in _ids(found) if quiet else _lines(found):
        writer.line(line)
    if found:
        return pytest.ExitCode.OK
    if not quiet:
        writer.line("no selected test has a contract")
    return pytest.ExitCode.NO_TESTS_COLLECTED


def _ids(found: Mapping[str, Module]) -> list[str]:
    return list(dict.fromkeys(id for module in found.values() for id in module.entries))


def _lines(found: Mapping[str, Module]) -> Iterator[str]:
    for name, module in found.items():
        yield f"{name}: {module.summary}" if module.summary else name
        yield ""
        for id, entry in module.entries.items():
            contract = entry.contract
            yield f"  {id}"
            yield f"      {contract.sentence}"
            yield f"      vLLM {contract.versions} on {', '.join(contract.backends)}; {_tests(entry)}"
            if contract.needs:
                yield f"      needs: {', '.join(contract.needs)}"
            if contract.references:
                yield f"      see: {', '.join(contract.references)}"
        yield ""
    if found:
        tests = sum(entry.tests.total() for module in found.values() for entry in module.entries.values())
        yield f"{_count(len(_ids(found)), 'contract')}, {_count(tests, 'test')}"


def _tests(entry: Entry) -> str:
    total = entry.tests.total()
    on_request = [
        f"{'all' if count == total else count} on request only: {option_of(name)}"
        for name, count in entry.on_request.items()
    ]
    return ", ".join([_count(total, "test"), *on_request])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
