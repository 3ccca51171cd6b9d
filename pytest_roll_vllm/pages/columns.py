"""Reports as columns: one for each version and backend, whatever the schema of the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_roll_vllm.matrix import WORDS, group
from pytest_roll_vllm.outcomes import OUTCOMES, Outcome

__all__ = ["OUTCOMES", "WORDS", "Column", "Outcome", "columns", "contracts", "group", "state", "totals"]

_EXPECTED: dict[Outcome, str] = {"known gap": "a known gap", "expected skip": "skipped as expected"}
_SINGLE = "pytest-roll-vllm/report/1"
_SEVERAL = "pytest-roll-vllm/report/2"


@dataclass(frozen=True)
class Column:
    """What became of the contracts on one version and backend.

    Attributes:
        label: Its name, which no other column has.
        run: What the report says of it, with what it says of the whole session.
    """

    label: str
    run: Mapping[str, Any]

    @property
    def contracts(self) -> Mapping[str, Any]:
        """The contracts by id."""
        found: Mapping[str, Any] = self.run["contracts"]
        return found

    @property
    def target(self) -> str:
        """Version, backend and engine, in one line."""
        vllm, engine = self.run["vllm"], self.run["engine"]
        version = f"vLLM {vllm['version']} ({vllm['distribution']})" if vllm else "vLLM not installed"
        return ", ".join(filter(None, (version, self.run["backend"], engine and f"engine {engine}")))

    @property
    def facts(self) -> dict[str, str]:
        """What it ran on, for people; reports of earlier versions of this project lack some of it."""
        run, device = self.run, self.run["device"] or {}
        memory = [f"{size / 2**30:.1f} GiB" for size in device.get("memory_bytes", ()) if size]
        names = ", ".join(f"{count} x {name}" for name, count in Counter([*map(str, device.get("names", ()))]).items())
        return {
            "vLLM": f"{run['vllm']['version']} ({run['vllm']['distribution']})" if run["vllm"] else "not installed",
            "backend": str(run["backend"]),
            "engine": str(run["engine"] or ""),
            "torch": str(run["torch"] or "not installed"),
            "Python": str(run["python"] or ""),
            "model": str(run["model"]),
            "device": names,
            "memory": ", ".join(dict.fromkeys(memory)),
            "chosen because": str(device.get("reason", "")),
            "system": str(self._environment.get("system", "")),
            "suite": f"{run['suite']['distribution']} {run['suite']['version']}",
            "started": str(run["date"]),
            "exit status": str(run["exit_status"]),
            "complete": "yes" if run["complete"] else "no",
            "problem": str(run["problem"]),
        }

    @property
    def packages(self) -> Mapping[str, str]:
        """The versions of packages besides vLLM and torch."""
        return self._environment.get("packages", {})

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment variables."""
        return self._environment.get("variables", {})

    @property
    def settings(self) -> dict[str, str]:
        """The settings, each with its source."""
        return {
            name: f"{one['value']} ({one['source']})" if one["value"] else f"({one['source']})"
            for name, one in self.run["settings"].items()
        }

    @property
    def seconds(self) -> float:
        """How long all tests of contracts took."""
        return sum(one["seconds"] for one in self.contracts.values())

    @property
    def notes(self) -> dict[str, dict[str, int]]:
        """The notes by their subject, each as JSON with the number of times it was made."""
        return {
            subject: Counter(json.dumps(value, sort_keys=True, ensure_ascii=False) for value in values)
            for subject, values in self.run["notes"].items()
        }

    @property
    def problems(self) -> list[str]:
        """Why it could not go on, and the expectations that match nothing."""
        unmatched = [
            f"{one['source']}: the whole suite has no test of {one['contract']!r} that {one['test']!r} matches"
            for one in self.run.get("expectations", ())
            if one["unmatched"]
        ]
        return [*filter(None, [self.run["problem"]]), *unmatched]

    @property
    def patches(self) -> Mapping[str, Mapping[str, Any]]:
        """The patches by name."""
        return {one["name"]: one for one in self.run.get("patches", ())}

    def outcome(self, id: str) -> Outcome | None:
        """The outcome of a contract, or ``None`` if the run did not select it."""
        found: Outcome | None = self.contracts[id]["outcome"] if id in self.contracts else None
        return found

    @property
    def _environment(self) -> Mapping[str, Any]:
        return self.run.get("environment") or {}


def columns(documents: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns of reports, in their order.

    Raises:
        ValueError: If one is not a report of a known schema, or lacks a key.
    """
    found: list[Column] = []
    for document in documents:
        schema = document.get("schema") if isinstance(document, Mapping) else None
        if schema not in (_SINGLE, _SEVERAL):
            raise ValueError(
                f"the schema is {schema!r}, and this version of pytest-roll-vllm knows {_SINGLE} and {_SEVERAL}; "
                "use the version that wrote the report, or a later one"
            )
        for run in document["runs"] if schema == _SEVERAL else [document]:
            column = Column("", {**document, **run})
            try:
                _ = column.facts, column.settings, column.notes, column.seconds
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"the report is not whole: {type(error).__name__}: {error}; run it again") from error
            found.append(
                Column(_unique(run.get("label") or _label(document), [one.label for one in found]), column.run)
            )
    return found


def contracts(found: Iterable[Column]) -> dict[str, Mapping[str, Any]]:
    """Return the contracts of all columns by id, sorted, each as the first column declares it."""
    declared: dict[str, Mapping[str, Any]] = {}
    for column in found:
        for id, one in column.contracts.items():
            declared.setdefault(id, one)
    return dict(sorted(declared.items(), key=lambda item: (group(item[0]), item[0])))


def totals(found: Iterable[Column]) -> dict[Outcome, int]:
    """Return the number of contracts with each outcome, each counted for every column."""
    counts = Counter(one["outcome"] for column in found for one in column.contracts.values())
    return {outcome: counts[outcome] for outcome in OUTCOMES}


def state(found: Sequence[Column]) -> str:
    """Say in a few words what came out."""
    counts = totals(found)
    bad = [f"{counts[outcome]} {outcome}" for outcome in ("failed", "could not run") if counts[outcome]]
    if bad:
        return ", ".join(bad)
    if not sum(counts.values()):
        return "no contracts were tested"
    found_expected = [f" or is {words}" for outcome, words in _EXPECTED.items() if counts[outcome]]
    return f"every contract that applies has passed{''.join(found_expected)}"


def _label(document: Mapping[str, Any]) -> str:
    vllm = document["vllm"]
    return f"{vllm['version'] if vllm else 'no vLLM'}-{document['backend']}"


def _unique(label: str, others: Sequence[str]) -> str:
    number = 1 + sum(other == label or other.startswith(f"{label} (") for other in others)
    return label if number == 1 else f"{label} ({number})"
