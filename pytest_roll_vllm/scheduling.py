"""How pytest-xdist runs the same tests in several environments: each version at its own pace.

xdist's own ``--dist each`` waits until all workers have collected, sends all tests at once, and ends the session when
a worker cannot start. Here a version starts when it has collected and it is its turn, gets its tests one by one, so
that the run can be stopped, and is given up alone if its process does not come up.

The only module that imports xdist; what it overrides of ``DSession`` is why its version has an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from shlex import quote
from typing import Any

import pytest
from xdist.dsession import DSession  # type: ignore[import-untyped]
from xdist.workermanage import NodeManager, WorkerController  # type: ignore[import-untyped]

from pytest_roll_vllm.report import named

_RESTARTS = 4  # of a version whose process died in a test, unless --max-worker-restart says otherwise


class Scheduler:
    """Gives every node all of its own tests, in order; so many nodes at a time.

    A node that replaces one that died gets what that one had left.

    Args:
        label_of: the name of a node's version.
        labels: the names of all versions that are going to run.
        limit: how many run at a time.
    """

    def __init__(self, label_of: Callable[[WorkerController], str], labels: Sequence[str], limit: int) -> None:
        self._label_of = label_of
        self._limit = limit
        self._open = dict.fromkeys(labels)  # versions that are not done with
        self._nodes: dict[str, WorkerController] = {}
        self._collections: dict[str, list[str]] = {}
        self._left: dict[str, list[int]] = {}  # tests that have no result, by their index
        self._sent: dict[str, int] = {}  # how many of these the node knows of; absent while it waits for its turn

    @property
    def nodes(self) -> list[WorkerController]:
        """The nodes that are alive."""
        return list(self._nodes.values())

    @property
    def collection_is_completed(self) -> bool:
        """Always, because no version waits for the others."""
        return True

    @property
    def tests_finished(self) -> bool:
        """Whether every version is done with."""
        return not self._open

    @property
    def has_pending(self) -> bool:
        """Whether tests are running."""
        return bool(self._sent)

    def add_node(self, node: WorkerController) -> None:
        """Take a node that has started, and not collected yet."""
        self._nodes[self._label_of(node)] = node

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Take the tests of a node."""
        label = self._label_of(node)
        if label in self._collections and self._collections[label] == list(collection):
            return  # it goes on where the one before it died
        self._collections[label] = list(collection)
        self._left[label] = list(range(len(collection)))

    def schedule(self) -> None:
        """Start what may start."""
        for label in self._open:
            node = self._nodes.get(label)
            if node and label in self._left and label not in self._sent and len(self._sent) < self._limit:
                self._sent[label] = 0
                # It starts a test only when it knows the one after that.
                self._send(label, 2)

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        """Send the next test to a node that has run one."""
        label = self._label_of(node)
        if item_index in self._left[label]:
            self._left[label].remove(item_index)
            self._sent[label] -= 1
        self._send(label, 1)

    def mark_test_pending(self, item: str) -> None:
        """Not for this scheduler."""
        raise NotImplementedError

    def remove_pending_tests_from_node(self, node: WorkerController, indices: Sequence[int]) -> None:
        """Not for this scheduler."""
        raise NotImplementedError

    def remove_node(self, node: WorkerController) -> str | None:
        """Forget a node that has ended, and return the test in which it died, if it did."""
        label = self._label_of(node)
        del self._nodes[label]
        started = self._sent.pop(label, None) is not None
        left = self._left.get(label)
        if started and left:
            return self._collections[label][left.pop(0)]
        if left is not None and not left:
            self.give_up(label)
        return None

    def give_up(self, label: str) -> None:
        """Be done with a version, and let the next one start."""
        self._open.pop(label, None)
        self.schedule()

    def is_open(self, label: str) -> bool:
        """Whether a version still has something to do."""
        return label in self._open

    def _send(self, label: str, count: int) -> None:
        node, first = self._nodes[label], self._sent[label]
        indices = self._left[label][first : first + count]
        if node.shutting_down:
            return
        if indices:
            with suppress(OSError):  # it stops by itself, as at the first failure, and will say so
                node.send_runtest_some(indices)
            self._sent[label] += len(indices)
        if self._sent[label] == len(self._left[label]):
            node.shutdown()  # when it has run what it knows of


class VersionsSession(DSession):
    """The xdist session of several versions.

    Args:
        config: pytest's configuration.
        interpreters: the interpreter of each version, by its name.
        own: xdist's descriptions of the nodes that the user adds; they are called by xdist's names.
        limit: how many versions run at a time.
        on_node: is called with a node and its version before it starts.
        on_lost: is called with a version that cannot go on, and why.
    """

    def __init__(
        self,
        config: pytest.Config,
        interpreters: Mapping[str, str],
        own: Sequence[str],
        *,
        limit: int,
        on_node: Callable[[WorkerController, str], None],
        on_lost: Callable[[str, str], None],
    ) -> None:
        super().__init__(config)
        specs = [f"popen//id={label}//python={quote(python)}" for label, python in interpreters.items()]
        self.nodemanager: NodeManager = _Nodes(config, [*specs, *own])
        self._labels = {id(spec): str(spec.id) for spec in self.nodemanager.specs}
        self._on_node = on_node
        self._on_lost = on_lost
        self._scheduler = Scheduler(self.label, list(self._labels.values()), limit)
        self._deaths: dict[str, int] = {}
        self._collected: dict[str, int] = {}
        given = config.option.maxworkerrestart
        self._restarts = _RESTARTS if given is None else int(given)

    def label(self, node: WorkerController) -> str:
        """Return the name of a node's version."""
        return self._labels[id(node.gateway.spec)]

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Start the nodes."""
        self._session = session
        self.config.hook.pytest_xdist_setupnodes(config=self.config, specs=self.nodemanager.specs)
        for spec in self.nodemanager.specs:
            try:
                self._active_nodes.add(self.nodemanager.setup_node(spec, self.queue.put))
            except Exception as error:  # of whatever kind: the others go on
                self._lose(self._labels[id(spec)], f"its process did not start: {type(error).__name__}: {error}")

    def pytest_configure_node(self, node: WorkerController) -> None:
        """Tell a node what it is for, and let another interpreter keep its own ``sys.path``."""
        label = self.label(node)
        self._on_node(node, label)
        if node.gateway.spec.python:
            node.gateway.spec.popen = None  # xdist gives the controller's path to those that have this set

    def loop_once(self) -> None:
        """Do not wait where there is nobody left to wait for."""
        if self._active_nodes:
            super().loop_once()
        else:
            self.triggershutdown()

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Use the scheduler of this module."""
        return self._scheduler

    def worker_collectionfinish(self, node: WorkerController, ids: Sequence[str]) -> None:
        """Count the tests of all versions, by which pytest tells how far it is."""
        super().worker_collectionfinish(node, ids)
        self._collected[self.label(node)] = len(ids)
        if self._session is not None:
            self._session.testscollected = sum(self._collected.values())

    def worker_collectreport(self, node: WorkerController, rep: Any) -> None:
        """Tell the failed collections of the versions apart; xdist shows equal ones once."""
        rep.node = node
        rep.nodeid = self._named(rep.nodeid, node)
        self.config.hook.pytest_collectreport(report=rep)
        self._handlefailures(rep)

    def worker_testreport(self, node: WorkerController, rep: pytest.TestReport) -> None:
        """Tell the tests of the versions apart, for whoever looks at reports."""
        path, line, domain = rep.location
        rep.location = (path, line, self._named(domain, node))
        rep.nodeid = self._named(rep.nodeid, node)
        super().worker_testreport(node, rep)

    def worker_logstart(self, node: WorkerController, nodeid: str, location: tuple[str, int | None, str]) -> None:
        """As the reports."""
        super().worker_logstart(node, self._named(nodeid, node), location)

    def worker_logfinish(self, node: WorkerController, nodeid: str, location: tuple[str, int | None, str]) -> None:
        """As the reports."""
        super().worker_logfinish(node, self._named(nodeid, node), location)

    def handle_crashitem(self, nodeid: str, worker: WorkerController) -> None:
        """As the reports."""
        super().handle_crashitem(self._named(nodeid, worker), worker)

    def worker_workerfinished(self, node: WorkerController) -> None:
        """Be done with a version; notice one that ended of its own accord without having run all its tests."""
        self.config.hook.pytest_testnodedown(node=node, error=None)
        output = node.workeroutput
        if output["exitstatus"] == pytest.ExitCode.INTERRUPTED:
            self.shouldstop = f"{node} received keyboard-interrupt"
        stopped = output["shouldfail"] or output["shouldstop"]
        self.shouldstop = self.shouldstop or stopped
        self._active_nodes.discard(node)  # has been taken out before after an internal error
        if node in self._scheduler.nodes:
            self._scheduler.remove_node(node)
        label = self.label(node)
        if not self.shouldstop and self._scheduler.is_open(label):
            self._lose(label, f"its process ended early (exit status {output['exitstatus']})")

    def worker_errordown(self, node: WorkerController, error: object | None) -> None:
        """Replace a process that died in a test; give its version up if it died otherwise, or too often."""
        self.config.hook.pytest_testnodedown(node=node, error=error)
        self._active_nodes.discard(node)
        label = self.label(node)
        crashed = None
        if node in self._scheduler.nodes:
            crashed = self._scheduler.remove_node(node)
            if crashed:
                self.handle_crashitem(crashed, node)
        if not self._scheduler.is_open(label) or self.shuttingdown or self.shouldstop:
            return
        self._deaths[label] = self._deaths.get(label, 0) + 1
        if crashed and self._deaths[label] <= self._restarts:
            self.report_line(f"\n{label}: its process died; a new one goes on")
            self._replace(node.gateway.spec, f"{label}.{self._deaths[label] + 1}")
        else:
            self._lose(label, _last_line(error))

    def worker_internal_error(self, node: WorkerController, formatted_error: str) -> None:
        """Give up a version in whose process pytest itself failed."""
        self.report_line(f"\n{formatted_error}")
        self._active_nodes.discard(node)
        self._lose(self.label(node), f"internal error: {_last_line(formatted_error)}")

    def _replace(self, spec: Any, name: str) -> None:
        spec.id = name
        try:
            self._active_nodes.add(self.nodemanager.setup_node(spec, self.queue.put))
        except Exception as error:
            self._lose(self._labels[id(spec)], f"its process did not start again: {type(error).__name__}: {error}")

    def _named(self, nodeid: str, node: WorkerController) -> str:
        return named(nodeid, self.label(node)) if len(self._labels) > 1 else nodeid

    def _lose(self, label: str, why: str) -> None:
        self._on_lost(label, why)
        self._scheduler.give_up(label)


class _Nodes(NodeManager):
    """Starts nodes; those of ours get nothing of the controller's."""

    EXIT_TIMEOUT = 30  # seconds for closing engines after an interrupt; xdist gives 10

    def setup_node(self, spec: Any, putevent: Any) -> WorkerController:
        """Start a node, which may be another one for the same description."""
        popen = spec.popen
        try:
            return super().setup_node(spec, putevent)
        finally:
            spec.popen = popen

    def rsync_roots(self, gateway: Any) -> None:
        """Copy what nodes on other machines need; xdist would put the controller's packages on the path of ours."""
        if not gateway.spec.popen:
            super().rsync_roots(gateway)


def _last_line(error: object) -> str:
    """Return the end of a traceback, where the exception is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("pytest.UsageError: ") if lines else "for an unknown reason"
