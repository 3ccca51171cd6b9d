"""``--vllm-prove``: which tests that is, and the table of contracts and saboteurs at the end."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import pytest

from pytest_roll_vllm import proof
from pytest_roll_vllm.options import SETTINGS, is_worker, usage_error
from pytest_roll_vllm.proof import KINDS, Saboteurs

#: Entry of a report's user_properties: how contracts fared, on the honest target or on a saboteur.
PROOF = "vllm_proof"

_TESTS = Path(__file__).with_name("test_saboteurs.py")


class Proof:
    """The plugin of a run that proves the suite.

    Args:
        config: of the run, whose arguments become the proof's own tests.

    Raises:
        pytest.UsageError: If paths were given, or there are no saboteurs.
    """

    def __init__(self, config: pytest.Config) -> None:
        settings = config.stash[SETTINGS]
        if config.args_source is pytest.Config.ArgsSource.ARGS and not is_worker(config):
            raise pytest.UsageError(
                f"--vllm-prove chooses the tests itself, and {' '.join(config.args)} was given; leave it out, and "
                "select saboteurs by name with -k"
            )
        # Saboteurs are rarely installed, and "pytest" does not look where it is run, as "python -m pytest" does.
        if str(config.rootpath) not in sys.path:
            sys.path.insert(0, str(config.rootpath))
        with usage_error(f"saboteurs {settings.saboteurs}"):
            self._saboteurs = proof.load(settings.saboteurs.value)
        config.args[:] = [str(_TESTS)]
        self._kind = settings.device.kind
        self._records: list[dict[str, Any]] = []

    @pytest.fixture
    def vllm_saboteurs(self) -> Saboteurs:
        return self._saboteurs

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        everyone = [one for one in self._saboteurs.by_name.values() if self._kind in (one.backends or (self._kind,))]
        order = list(KINDS)
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", [kind for kind in KINDS if any(one.kind == kind for one in everyone)])
        elif "saboteur" in metafunc.fixturenames:
            ordered = sorted(everyone, key=lambda one: (order.index(one.kind), one.starts_engine))
            metafunc.parametrize("saboteur", ordered, ids=lambda one: f"{one.name}-{one.kind}")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The engines of one kind after the other, the honest target first."""
        order = list(KINDS)

        def place(item: pytest.Item) -> tuple[int, bool]:
            params = item.callspec.params  # type: ignore[attr-defined]
            saboteur = params.get("saboteur")
            return order.index(saboteur.kind if saboteur else params["kind"]), saboteur is not None

        items.sort(key=place)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self._records += [cast("dict[str, Any]", value) for name, value in report.user_properties if name == PROOF]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._records:
            return
        terminalreporter.section("contracts and saboteurs")
        for line in lines(self._records):
            terminalreporter.write_line(line)


def lines(records: list[dict[str, Any]]) -> list[str]:
    """The table: a line for each contract, with the honest target's verdict and each saboteur's."""
    honest: dict[str, set[str]] = defaultdict(set)
    broken: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        for contract, verdict in record["verdicts"].items():
            if record["saboteur"]:
                caught = {"failed": "caught", "passed": "SURVIVED", "not run": "NOT RUN"}.get(verdict, verdict)
                broken[contract][record["saboteur"]] = caught
            else:
                honest[contract].add(verdict if verdict in ("passed", "n/a") else verdict.upper())
    names = sorted(honest.keys() | broken.keys())
    width = max(map(len, [*names, "contract"]))
    table = [f"{'contract':{width}}  {'honest':8}  saboteurs"]
    for name in names:
        said = "/".join(sorted(honest[name])) or "-"
        others = ", ".join(f"{saboteur}: {verdict}" for saboteur, verdict in sorted(broken[name].items()))
        table.append(f"{name:{width}}  {said:8}  {others or '-'}")
    verdicts = [verdict for by_name in broken.values() for verdict in by_name.values()]
    good = sum(verdict == "caught" for verdict in verdicts)
    here = [verdict for verdict in verdicts if verdict != "n/a"]
    table.append(
        f"{len(names)} contracts, {len({s for by_name in broken.values() for s in by_name})} saboteurs: "
        f"{good} of {len(here)} pairs caught"
    )
    return table
