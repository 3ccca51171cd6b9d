"""Putting a trainer's tensors into the engine's parameters: completely, or with an error.

vLLM's own ``load_weights`` decides where a checkpoint tensor goes (fused, sharded, padded). It says neither
whether every parameter was reached nor whether every tensor went somewhere, and it costs several times the
copy. So the first update runs through it while a recorder watches every write; from the record comes a
*route* for each tensor: which part of it goes to which part of which parameter. Each route is checked bit by
bit before it is trusted. Later updates replay the routes as one grouped copy; a tensor without a
trusted route goes through ``load_weights`` again.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from roll_vllm.errors import WeightUpdateError
from roll_vllm.transfer.manifest import TensorSpec, dtype_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

logger = logging.getLogger(__name__)

NamedTensorList = Sequence[tuple[str, torch.Tensor]]

_MOST_NAMED = 10


@dataclass(frozen=True)
class Region:
    """A strided part of a storage, in elements."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, origin: int = 0) -> Region:
        """Where ``tensor`` lies in its storage, counted from element ``origin``."""
        return cls(tensor.storage_offset() - origin, tuple(tensor.shape), tuple(tensor.stride()))

    def view(self, base: torch.Tensor, origin: int = 0) -> torch.Tensor:
        """This part of ``base``'s storage as a tensor."""
        return base.as_strided(self.size, self.stride, self.offset + origin)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.size)

    @property
    def dense(self) -> bool:
        """Whether its elements lie one after the other, as those of a contiguous tensor do."""
        stride = 1
        for size, step in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and step != stride:
                return False
            stride *= size
        return True


@dataclass(frozen=True)
class Write:
    """One write into a parameter: a copy of part of the sent tensor, or a constant."""

    parameter: str
    target: Region
    source: Region | None = None
    constant: float | None = None

    @property
    def replayable(self) -> bool:
        """Whether the write can be done again without asking the model."""
        return self.source is not None or self.constant is not None


@dataclass
class Route:
    """Where one checkpoint tensor goes.

    Attributes:
        spec: the tensor it was learned from; others must agree in dtype and shape.
        writes: everything that loading it writes.
        trusted: every write is replayable, and replaying gives what ``load_weights`` gave.
    """

    spec: TensorSpec
    writes: list[Write]
    trusted: bool = False
    targets: list[tuple[torch.Tensor, Write]] = field(default_factory=list)


@dataclass
class _Plan:
    """What to do with tensors that all go by route; holds them, and parts of the parameters."""

    pairs: NamedTensorList
    names: frozenset[str]
    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    constants: list[tuple[torch.Tensor, float]] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """Notes every write into a parameter's storage, and which incoming tensor it came from."""

    def __init__(self, owners: dict[int, str], pairs: NamedTensorList) -> None:
        super().__init__()
        self.writes: dict[str, list[Write]] = defaultdict(list)
        self.current = pairs[0][0]
        self._owners = owners
        self._spans = {name: (t.data_ptr(), t.data_ptr() + t.nbytes, t) for name, t in pairs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = [
            value for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor)
        ]  # fmt: skip
        for target in written:
            parameter = self._owners.get(target.untyped_storage()._cdata)
            if parameter is not None:
                self._note(func, parameter, target, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, parameter: str, target: torch.Tensor, args: Any) -> None:
        name, source, constant = self.current, None, None
        if func is torch.ops.aten.copy_.default:
            found = self._sender_of(args[1])
            if found is not None:
                name, sent = found
                if args[1].dtype != target.dtype:
                    raise WeightUpdateError(
                        f"{name} has dtype {dtype_name(args[1].dtype)}, but {parameter} holds "
                        f"{dtype_name(target.dtype)}: cast it to torch.{dtype_name(target.dtype)} before sending"
                    )
                if args[1].shape == target.shape:
                    source = Region.of(args[1], sent.storage_offset())
        elif func is torch.ops.aten.fill_.Scalar:
            constant = args[1]
        elif func is torch.ops.aten.zero_.default:
            constant = 0.0
        self.writes[name].append(Write(parameter, Region.of(target), source, constant))

    def _sender_of(self, source: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        # The current one first: tensors that share memory are sent under several names.
        for name in chain((self.current,), self._spans):
            start, end, tensor = self._spans[name]
            if start <= source.data_ptr() < end and source.dtype == tensor.dtype:
                return name, tensor
        return None


class WeightLoader:
    """Loads complete sets of weights into one worker's model.

    Args:
        model: the worker's part of the model, with vLLM's ``load_weights``.
        tied: whether the model ties ``lm_head`` to its embeddings.
        optional: parameters that a complete set need not reach.
    """

    def __init__(self, model: torch.nn.Module, tied: bool, optional: Collection[str] = ()) -> None:
        self._model = model
        self._tied = tied
        self._optional = frozenset(optional)
        self._on_other_ranks = tuple(
            f"{name}." for name, module in model.named_modules() if type(module).__name__ == "PPMissingLayer"
        )
        self._routes: dict[str, Route] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._owners: dict[int, str] = {}
        self._known_complete: set[frozenset[str]] = set()
        self._known_covered: set[tuple[str, frozenset[str]]] = set()
        self.rescan()
        self.begin()

    def rescan(self) -> None:
        """Look at the model's parameters again; forget all routes when their storages changed."""
        parameters = dict(self._model.named_parameters())
        owners: dict[int, str] = {}
        for name, parameter in parameters.items():
            owners.setdefault(parameter.untyped_storage()._cdata, name)
        if owners != self._owners:
            self._routes.clear()
            self._known_complete.clear()
            self._known_covered.clear()
        self._parameters, self._owners = parameters, owners
        self._dtypes = sorted({dtype_name(parameter.dtype) for parameter in parameters.values()})
        self.forget()

    def forget(self) -> None:
        """Let go of the tensors that :meth:`load` was given."""
        #: By the identity of a list that was loaded by route alone.
        self._plans: dict[int, _Plan] = {}

    def knows(self, pairs: NamedTensorList) -> bool:
        """Whether the very same list was loaded before, by route alone, and is still known to fit."""
        return id(pairs) in self._plans

    def begin(self) -> None:
        """Start a new set: nothing is received yet."""
        self._received: set[str] = set()
        self._tied_heads: dict[str, torch.Tensor] = {}
        #: Whether this set has written to a parameter.
        self.dirty = False
        #: Tensors that went through ``load_weights`` and by route in this set.
        self.loaded = 0
        self.replayed = 0

    def load(self, pairs: NamedTensorList) -> None:
        """Load some tensors of the set.

        Args:
            pairs: checkpoint names and tensors on the model's device. They are kept until :meth:`forget`, because
                a sender that shares its memory sends the same list again, which then needs no second look.

        Raises:
            WeightUpdateError: a name, dtype or shape is wrong. ``dirty`` tells whether anything was written.
        """
        plan, others = self._plans.get(id(pairs)), []
        if plan is None:
            wanted = [(name, tensor) for name, tensor in pairs if not self._set_aside(name, tensor)]
            for name, tensor in wanted:
                self._check(name, tensor)
            routed = [(name, tensor) for name, tensor in wanted if self._trusted(name)]
            others = [(name, tensor) for name, tensor in wanted if not self._trusted(name)]
            plan = self._plan(pairs if len(routed) == len(pairs) else routed)
            if plan.pairs is pairs:
                self._plans[id(pairs)] = plan
        with torch.no_grad():
            if plan.pairs:
                self._replay(plan)
            if others:
                self._learn(others)
        self._received.update(plan.names)
        self._received.update(name for name, _ in others)

    def touches_parameters(self, names: Iterable[str]) -> bool:
        """Whether any of the tensors would be written (a tied ``lm_head`` alone would not)."""
        return not all(self._is_set_aside(name) for name in names)

    def missing(self) -> list[str]:
        """Parameters of which the set has not yet reached every element."""
        received = frozenset(self._received)
        if received in self._known_complete:
            return []
        missing = list(self._uncovered())
        if not missing:
            self._known_complete.add(received)
        return missing

    def finish(self) -> None:
        """Check that the set is complete, tied heads included.

        Raises:
            WeightUpdateError: a parameter was not reached, or a tied head differs from its embeddings.
        """
        missing = self.missing()
        if missing:
            raise WeightUpdateError(
                f"the update reached {len(self._parameters) - len(missing)} of {len(self._parameters)} parameters; "
                f"not (completely) reached: {_some(missing)}. Send every tensor of the checkpoint"
            )
        self.check_tied_heads()

    def check_tied_heads(self) -> None:
        """Check the heads that were sent beside the embeddings they are tied to, and drop them.

        Raises:
            WeightUpdateError: one of them differs.
        """
        heads, self._tied_heads = self._tied_heads, {}
        for name, head in heads.items():
            self._check_tied(name, head)

    def remember_embeddings(self, other: WeightLoader) -> None:
        """Take over where the loader of a model of the same names put the embeddings, to judge heads tied to them."""
        for name, route in other._routes.items():
            if name.endswith("embed_tokens.weight"):
                self._routes[name] = replace(route, targets=[], trusted=False)

    # -- one tensor ---------------------------------------------------------------------------------------

    def _is_set_aside(self, name: str) -> bool:
        # vLLM recomputes rotary tables and skips a tied head; neither has a parameter of its own. Layers of other
        # pipeline stages have theirs on other ranks.
        return (
            name.endswith("rotary_emb.inv_freq")
            or (self._tied and name.endswith("lm_head.weight"))
            or name.startswith(self._on_other_ranks)
        )

    def _set_aside(self, name: str, tensor: torch.Tensor) -> bool:
        if not self._is_set_aside(name):
            return False
        if self._tied and name.endswith("lm_head.weight"):
            self._tied_heads[name] = tensor.clone()
        return True

    def _check_tied(self, name: str, head: torch.Tensor) -> None:
        embeddings = [route for key, route in self._routes.items() if key.endswith("embed_tokens.weight")]
        for route in embeddings:
            agrees = tuple(head.shape) == route.spec.shape and dtype_name(head.dtype) == route.spec.dtype
            for write in route.writes if agrees else ():
                if write.source is None:
                    continue
                target = write.target.view(self._parameters[write.parameter].data)
                agrees = agrees and _same_bits(write.source.view(head, head.storage_offset()), target)
            if not agrees:
                raise WeightUpdateError(
                    f"{name} differs from {route.spec.name}, but the model ties them: send the same tensor, or "
                    f"leave {name} out"
                )

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        route = self._routes.get(name)
        if route is not None and route.spec != spec:
            raise WeightUpdateError(
                f"{spec} does not fit: the engine takes it as {route.spec.dtype}, shape {list(route.spec.shape)}. "
                "Nothing of this bucket was loaded; cast or reshape the tensor before sending"
            )
        if spec.dtype not in self._dtypes:
            raise WeightUpdateError(
                f"{spec} has a dtype that no parameter of this engine has; cast it to one of "
                f"{', '.join(f'torch.{d}' for d in self._dtypes)} before sending. Nothing of this bucket was loaded"
            )

    def _trusted(self, name: str) -> bool:
        return name in self._routes and self._routes[name].trusted

    # -- loading ------------------------------------------------------------------------------------------

    def _replay(self, plan: _Plan) -> None:
        self.dirty = True
        for target, constant in plan.constants:
            target.fill_(constant)
        torch._foreach_copy_(plan.targets, plan.sources)
        self.replayed += len(plan.pairs)

    def _plan(self, pairs: NamedTensorList) -> _Plan:
        plan = _Plan(pairs, frozenset(name for name, _ in pairs))
        for name, tensor in pairs:
            origin = tensor.storage_offset()
            for target, write in self._routes[name].targets:
                if write.source is not None:
                    plan.targets.append(target)
                    plan.sources.append(write.source.view(tensor, origin))
                elif write.constant is not None:
                    plan.constants.append((target, write.constant))
        return plan

    def _learn(self, pairs: NamedTensorList) -> None:
        recorder = _Recorder(self._owners, pairs)
        architecture = type(self._model).__name__

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in pairs:
                recorder.current = name
                yield name, tensor

        try:
            with _lora_wrappers_hidden(self._model), recorder:
                self._model.load_weights(stream())
        except WeightUpdateError:
            raise
        except Exception as error:
            # Upstream's loaders answer with a bare KeyError or assertion.
            name, tensor = recorder.current, dict(pairs).get(recorder.current)
            described = (
                f"{name} ({dtype_name(tensor.dtype)}, shape {list(tensor.shape)})" if tensor is not None else name
            )
            raise WeightUpdateError(
                f"{architecture} cannot load {described}: {type(error).__name__}: {error}. Check the name and the "
                "shape against the checkpoint the engine was configured with"
            ) from error
        finally:
            self.dirty = self.dirty or any(recorder.writes.values())
        unmatched = [name for name, _ in pairs if not recorder.writes.get(name)]
        if unmatched:
            raise WeightUpdateError(
                f"{_some(unmatched)} match no parameter of {architecture}; send only tensors of its checkpoint"
            )
        for name, tensor in pairs:
            self._routes[name] = self._route(name, tensor, recorder.writes[name])
        self.loaded += len(pairs)

    def _route(self, name: str, tensor: torch.Tensor, writes: list[Write]) -> Route:
        route = Route(TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)), writes)
        route.targets = [(write.target.view(self._parameters[write.parameter].data), write) for write in writes]
        origin = tensor.storage_offset()
        # Constants alone are the tensor's own value: vLLM loads single elements by fill_(tensor.item()).
        route.trusted = any(write.source is not None for write in writes) and all(
            write.replayable and (write.source is None or _same_bits(write.source.view(tensor, origin), target))
            for target, write in route.targets
        )
        if not route.trusted:
            logger.warning("weight %s cannot be replayed as a copy; it always goes through load_weights", name)
        return route

    def _uncovered(self) -> Iterator[str]:
        regions: dict[str, list[Region]] = defaultdict(list)
        senders: dict[str, set[str]] = defaultdict(set)
        for name in self._received:
            for write in self._routes[name].writes:
                regions[write.parameter].append(write.target)
                senders[write.parameter].add(name)
        for name, parameter in self._parameters.items():
            storage = parameter.untyped_storage()
            owner = self._owners[storage._cdata]
            written, known = regions[owner], (name, frozenset(senders[owner]))
            if known in self._known_covered or name in self._optional:
                continue
            if sum(region.numel for region in written) < parameter.numel():
                yield name
                continue
            if _adjoin(written, Region.of(parameter.data)):
                self._known_covered.add(known)
                continue
            mask = torch.zeros(storage.nbytes() // parameter.element_size(), dtype=torch.bool)
            for region in written:
                region.view(mask).fill_(True)
            if bool(Region.of(parameter.data).view(mask).all()):
                self._known_covered.add(known)
            else:
                yield name


def _adjoin(parts: Iterable[Region], whole: Region) -> bool:
    """Whether dense parts of a storage leave nothing out of a dense whole. Cheap, where counting elements is not."""
    parts = sorted((part for part in parts if part.dense), key=lambda part: part.offset)
    end = whole.offset
    for part in parts:
        if part.offset > end:
            return False
        end = max(end, part.offset + part.numel)
    return whole.dense and end >= whole.offset + whole.numel


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype hold the same, NaNs included."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.view(whole), other.view(whole))


@contextmanager
def _lora_wrappers_hidden(model: torch.nn.Module) -> Iterator[None]:
    """Give parameters the names they have without LoRA, by which vLLM's loaders look for them.

    With ``enable_lora`` each layer that can be adapted sits as ``base_layer`` inside a wrapper.
    """
    changed = []
    for module in model.modules():
        if any("base_layer." in name for name, _ in module.named_parameters()):
            vars(module)["named_parameters"] = partial(_named_without_wrappers, module.named_parameters)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["named_parameters"]


def _named_without_wrappers(named_parameters: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
    for name, parameter in named_parameters(*args, **kwargs):
        yield name.replace("base_layer.", ""), parameter


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
