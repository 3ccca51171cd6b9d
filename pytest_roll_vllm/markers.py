"""The markers: registration, signatures, selection by version, and the order of tests.

``vllm_version`` and ``vllm_backend`` say where a test makes sense. Elsewhere it is *not applicable*, which
is a skip that the test declared beforehand, in contrast to every other skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any

import pytest

from pytest_roll_vllm.contracts import Contract, check_backends, check_capabilities
from pytest_roll_vllm.options import SETTING_NAMES, Settings, option_of
from pytest_roll_vllm.outcomes import CONTRACT, NOT_APPLICABLE
from roll_vllm import versions

CONTRACT_KEY = pytest.StashKey[Contract]()

# A test that uses one of these runs on an engine, and belongs next to others that can share it.
_ENGINE_FIXTURES = {"vllm_engine", "vllm_model"}


def vllm_version(specifier: str) -> str:
    """Check a call of the marker, and return its argument."""
    versions.satisfies("0", specifier)  # raises if malformed
    return specifier


def vllm_backend(kind: str, *, count: int = 1, reference: bool = True) -> tuple[str, int, bool]:
    """Check a call of the marker, and return its arguments."""
    check_backends([kind])
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count is {count!r}, and must be a whole number above 0")
    return kind, count, reference


def vllm_generation(engine: str) -> str:
    """Check a call of the marker, and return its argument."""
    if engine not in ("V0", "V1"):
        raise ValueError(f"the engine generation is {engine!r}, and must be 'V0' or 'V1'")
    return engine


def vllm_engine_key(key: object) -> str:
    """Check a call of the marker, and return its argument as text."""
    return repr(key)


def vllm_needs(*capabilities: str) -> tuple[str, ...]:
    """Check a call of the marker, and return its arguments."""
    check_capabilities(capabilities)
    return capabilities


def vllm_on_request(setting: str) -> str:
    """Check a call of the marker, and return its argument."""
    if setting not in SETTING_NAMES:
        raise ValueError(f"there is no setting {setting!r}; choose one of: {', '.join(SETTING_NAMES)}")
    return setting


_SIGNATURES: dict[str, Callable[..., Any]] = {
    "vllm_version": vllm_version,
    "vllm_backend": vllm_backend,
    "vllm_generation": vllm_generation,
    "vllm_contract": Contract,
    "vllm_needs": vllm_needs,
    "vllm_on_request": vllm_on_request,
    "vllm_engine_key": vllm_engine_key,
}
_USAGE = {
    "vllm_version": "vllm_version(specifier): run only with vLLM versions in the PEP 440 specifier",
    "vllm_backend": "vllm_backend(kind, *, count=1, reference=True): run only on devices of this kind, at least so "
    "many, and not on the reference platform if reference is False; several kinds are alternatives",
    "vllm_generation": "vllm_generation(engine): run only on engines of this generation, 'V0' or 'V1'",
    "vllm_contract": "vllm_contract(id, sentence, *, versions, backends, references, needs): "
    "the test proves a contract; set it with pytest_roll_vllm.contracts.contract",
    "vllm_needs": "vllm_needs(*capabilities): run only on a target that has these capabilities",
    "vllm_on_request": "vllm_on_request(setting): run only if the user gave this setting, such as 'executors', "
    "because it takes long",
    "vllm_engine_key": "vllm_engine_key(key): run next to the tests with the same key, "
    "because they can share an engine",
}


def register(config: pytest.Config) -> None:
    """Register all markers."""
    for line in _USAGE.values():
        config.addinivalue_line("markers", line)
    for row in versions.TESTED:
        config.addinivalue_line("markers", f"{row.marker}: the test applies to vLLM {row.release} (set automatically)")


def calls(item: pytest.Item, name: str) -> list[Any]:
    """Return the checked arguments of all markers of a name, the closest first.

    Raises:
        pytest.UsageError: If a marker was called wrongly.
    """
    return [_call(item, mark) for mark in item.iter_markers(name)]


def uses_plugin(item: pytest.Item) -> bool:
    """Whether a test has one of our markers or uses one of our fixtures."""
    if any(mark.name in _SIGNATURES for mark in item.iter_markers()):
        return True
    # By definition and not by name: other projects have fixtures called vllm_something, too.
    return any(module.startswith("pytest_roll_vllm.") for module, _ in _fixtures(item).values())


def apply(items: Iterable[pytest.Item]) -> None:
    """Check the markers of all tests, and mark each test of ours with the tested versions it applies to.

    Raises:
        pytest.UsageError: If a marker was called wrongly, or one contract was declared in two ways.
    """
    declared: dict[str, tuple[Contract, str]] = {}
    for item in filter(uses_plugin, items):
        calls(item, "vllm_backend")
        calls(item, "vllm_generation")
        calls(item, "vllm_needs")
        calls(item, "vllm_on_request")
        specifiers = calls(item, "vllm_version")
        # The closest one counts, so that a test in a class can have a contract of its own.
        for contract in calls(item, "vllm_contract")[:1]:
            first, where = declared.setdefault(contract.id, (contract, item.nodeid))
            if first != contract:
                raise pytest.UsageError(
                    f"contract {contract.id!r} is declared in two ways, in {where}: {first}, "
                    f"and in {item.nodeid}: {contract}. Give both the same words, or one another id."
                )
            item.stash[CONTRACT_KEY] = contract
            item.user_properties.append((CONTRACT, contract.id))
            item.extra_keyword_matches.add(contract.id)  # for -k
            specifiers.append(contract.versions)
        for row in versions.TESTED:
            if all(versions.satisfies(row.release, one) for one in specifiers):
                item.add_marker(row.marker)


def skip_unless_applicable(item: pytest.Item, settings: Settings) -> None:
    """Skip a test that is not meant for this version or backend, and record why."""
    reason = (
        _not_requested(item, settings)
        or _wrong_version(item, settings)
        or _wrong_backend(item, settings)
        or _wrong_generation(item, settings)
        or _wrong_executor(item, settings)
        or _wrong_target(item, settings)
    )
    if reason:
        item.user_properties.append((NOT_APPLICABLE, reason))
        pytest.skip(f"not applicable: {reason}")


def group_by_engine(items: list[pytest.Item]) -> None:
    """Move tests that can share an engine behind the first of them; all others keep their place."""
    first: dict[object, int] = {}
    places = [first.setdefault(engine_key(item) or item, index) for index, item in enumerate(items)]
    items[:] = [item for _, item in sorted(zip(places, items, strict=True), key=itemgetter(0))]


def engine_key(item: pytest.Item) -> str | None:
    """Return what tests that can share an engine have in common, or ``None`` if a test needs no engine.

    It is the argument of the marker ``vllm_engine_key``, or else the parameters of the ``vllm_`` fixtures and
    the definitions that override ours.
    """
    keys: list[str] = calls(item, "vllm_engine_key")
    if keys:
        return keys[0]
    fixtures = _fixtures(item)
    if _ENGINE_FIXTURES.isdisjoint(fixtures) or not uses_plugin(item):
        return None
    callspec = getattr(item, "callspec", None)
    parts = [(name, repr(value)) for name, value in callspec.params.items()] if callspec else []
    parts += [
        (name, ".".join(where)) for name, where in fixtures.items() if not where[0].startswith("pytest_roll_vllm.")
    ]
    return repr(sorted(part for part in parts if part[0].startswith("vllm_")))


def _fixtures(item: pytest.Item) -> dict[str, tuple[str, str]]:
    """Return module and function of each fixture that a test uses."""
    info = getattr(item, "_fixtureinfo", None)  # tests that are no functions, such as doctests, may have none
    chains = info.name2fixturedefs.items() if info else ()
    functions = ((name, chain[-1].func) for name, chain in chains if chain)  # the last one overrides others
    return {name: (function.__module__, function.__qualname__) for name, function in functions}


def _call(item: pytest.Item, mark: pytest.Mark) -> Any:
    try:
        return _SIGNATURES[mark.name](*mark.args, **mark.kwargs)
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(
            f"{item.nodeid}: wrong use of a marker: {error}. The marker is {_USAGE[mark.name]}."
        ) from error


def _not_requested(item: pytest.Item, settings: Settings) -> str:
    missing = [name for name in calls(item, "vllm_on_request") if not settings.all()[name].given]
    return f"runs on request only, because it takes minutes: give {option_of(missing[0])}" if missing else ""


def _wrong_version(item: pytest.Item, settings: Settings) -> str:
    contract = item.stash.get(CONTRACT_KEY, None)
    wanted = calls(item, "vllm_version") + ([contract.versions] if contract else [])
    if not wanted:
        return ""
    found = settings.installed
    if found is None:
        # Not "not applicable": without a vLLM nobody can tell.
        pytest.skip(f"needs vLLM {' and '.join(wanted)}, and none is installed: `pip install vllm`")
    if all(versions.satisfies(found.version, one) for one in wanted):
        return ""
    return f"needs vLLM {' and '.join(wanted)}, found {found.version}"


def _wrong_backend(item: pytest.Item, settings: Settings) -> str:
    contract = item.stash.get(CONTRACT_KEY, None)
    needed: dict[str, int] = {}  # different kinds are alternatives; of one kind, the largest count is needed
    reference = True
    for kind, count, also_reference in calls(item, "vllm_backend"):
        needed[kind] = max(count, needed.get(kind, 0))
        reference = reference and also_reference
    if contract is None and not needed:
        return ""
    device = settings.device
    found = f"found {device.count} {device.kind} ({device.reason})"
    if contract and device.kind not in contract.backends:
        return f"needs {' or '.join(contract.backends)}, {found}"
    if needed and needed.get(device.kind, device.count + 1) > device.count:
        return f"needs {' or '.join(f'{count} {kind}' for kind, count in needed.items())}, {found}"
    if not reference and device.backend == "cpu-reference":
        return f"needs more than the reference platform, {found}"
    return ""


def _wrong_generation(item: pytest.Item, settings: Settings) -> str:
    wanted = calls(item, "vllm_generation")
    found = settings.engine if wanted else None
    if found is None or all(one == found for one in wanted):  # none without a vLLM, which other checks notice
        return ""
    return f"needs a {' and '.join(wanted)} engine, found {found}"


def _wrong_executor(item: pytest.Item, settings: Settings) -> str:
    callspec = getattr(item, "callspec", None)
    wanted = callspec.params.get("vllm_executor") if callspec else None
    # Where the vLLM version has no such executor, or the user wants another one.
    if wanted is None or not uses_plugin(item) or wanted in settings.wanted_executors:
        return ""
    return f"needs the executor {wanted}; this run tests {', '.join(settings.wanted_executors)}"


def _wrong_target(item: pytest.Item, settings: Settings) -> str:
    contract = item.stash.get(CONTRACT_KEY, None)
    needed = [*(contract.needs if contract else ()), *(name for call in calls(item, "vllm_needs") for name in call)]
    return next(filter(None, map(settings.missing, needed)), "")
